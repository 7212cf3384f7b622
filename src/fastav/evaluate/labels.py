"""Placing the labels of points so that they do not overlap."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Number = float | int


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; y points down."""

    left: Number
    top: Number
    right: Number
    bottom: Number

    def overlap(self, other: "Box") -> Number:
        """The area that both boxes cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def outside(self, other: "Box") -> Number:
        """The area of this box that the other does not cover."""
        return (self.right - self.left) * (self.bottom - self.top) - self.overlap(other)


def place_labels(
    points: Sequence[tuple[Number, Number]], sizes: Sequence[tuple[Number, Number]], area: Box, obstacles: Sequence[Box]
) -> list[Box]:
    """A box for the label of every point, at the nearest free place.

    sizes: width and height of each label. area: where labels may be. obstacles: boxes that labels must not cover.
    Labels overlap neither each other nor obstacles as long as there is room; then the place with the least overlap is
    used.
    """
    boxes: list[Box] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):

        def cost(box: Box) -> Number:
            return box.outside(area) + sum(map(box.overlap, obstacles)) + sum(4 * box.overlap(other) for other in boxes)

        candidates = list(_candidates(x, y, width, height, area))
        boxes.append(next((box for box in candidates if cost(box) <= 1e-6), None) or min(candidates, key=cost))
    return boxes


def _candidates(x: Number, y: Number, width: Number, height: Number, area: Box) -> Iterator[Box]:
    """Boxes at growing distance: right, left, above, below and between; then all over the area, nearest first."""
    for gap in (10.0, 14.0, 20.0, 28.0, 40.0, 56.0):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            middle = x + dx * (gap + width / 2), y + dy * (gap + height / 2)
            yield _box(*middle, width, height)
    across = int((area.right - area.left - width) / 12) + 1
    down = int((area.bottom - area.top - height) / (height / 2)) + 1
    grid = [
        (area.left + width / 2 + 12 * i, area.top + height / 2 + height / 2 * j)
        for i in range(max(1, across))
        for j in range(max(1, down))
    ]
    for middle in sorted(grid, key=lambda middle: (middle[0] - x) ** 2 + (middle[1] - y) ** 2):
        yield _box(*middle, width, height)


def _box(x: Number, y: Number, width: Number, height: Number) -> Box:
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
