"""How things look: each is made of a few parts, in a picture two units wide and high, facing right; y points down."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

Point = tuple[float | int, float | int]
Paint = Literal["own", "deep", "dark", "light", "glass", "wood"]
PAINTS: dict[Paint, tuple[float, float, float]] = {
    "dark": (0.1, 0.1, 0.12),
    "light": (0.85, 0.83, 0.75),
    "glass": (0.5, 0.75, 0.85),
    "wood": (0.55, 0.35, 0.15),
}
DEEP = 0.62  # brightness of a deep part against the thing's own colour


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a thing.

    form: "oval" or "box" with the points (centre), (half width, half height); "bar" between two points; "patch", a
    convex polygon, its points clockwise. width: half the width of a bar. swing: how far the last point of a bar or a
    patch swings to either side.
    """

    paint: Paint
    form: Literal["oval", "box", "bar", "patch"]
    points: tuple[Point, ...]
    width: float = 0.08
    swing: Point = (0, 0)

    def distance(
        self, x: Float[np.ndarray, "frames rows columns"], y: Float[np.ndarray, "frames rows columns"], beat: np.ndarray
    ) -> Float[np.ndarray, "frames rows columns"]:
        """The approximate distance of each point from the part's border, negative inside.

        beat: of each frame, the state of what swings, in [-1, 1].
        """
        beat = beat.astype(np.float32)[:, None, None]
        if self.form == "oval":
            (cx, cy), (rx, ry) = self.points
            return (np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)
        if self.form == "box":
            (cx, cy), (rx, ry) = self.points
            return np.maximum(abs(x - cx) - rx, abs(y - cy) - ry)
        *fixed, (lx, ly) = self.points
        last = lx + beat * self.swing[0], ly + beat * self.swing[1]
        if self.form == "bar":
            ((ax, ay),) = fixed
            dx, dy = last[0] - ax, last[1] - ay
            along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx**2 + dy**2), 0, 1)
            return np.hypot(x - ax - along * dx, y - ay - along * dy) - self.width
        corners = [*fixed, last]
        edges = []
        for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
            dx, dy = bx - ax, by - ay
            edges.append(((x - ax) * dy - (y - ay) * dx) / np.hypot(dx, dy))
        return np.maximum.reduce(edges)


def _wheel(x: float, y: float, size: float) -> tuple[Part, ...]:
    return Part("dark", "oval", ((x, y), (size, size))), Part("light", "oval", ((x, y), (size * 0.4, size * 0.4)))


SPRITES: dict[str, tuple[Part, ...]] = {
    "car": (
        Part("own", "patch", ((-0.55, -0.05), (-0.35, -0.5), (0.3, -0.5), (0.6, -0.05))),
        Part("own", "box", ((0, 0.15), (0.95, 0.25))),
        Part("glass", "patch", ((-0.38, -0.08), (-0.26, -0.4), (-0.04, -0.4), (-0.04, -0.08))),
        Part("glass", "patch", ((0.08, -0.08), (0.08, -0.4), (0.24, -0.4), (0.42, -0.08))),
        *_wheel(-0.52, 0.42, 0.24),
        *_wheel(0.52, 0.42, 0.24),
    ),
    "bus": (
        Part("own", "box", ((0, -0.1), (0.95, 0.62))),
        *(Part("glass", "box", ((x, -0.3), (0.17, 0.2))) for x in (-0.65, -0.2, 0.25, 0.7)),
        Part("deep", "box", ((0, 0.2), (0.95, 0.07))),
        *_wheel(-0.55, 0.56, 0.22),
        *_wheel(0.55, 0.56, 0.22),
    ),
    "bike": (
        *(Part("dark", "oval", ((x, 0.35), (0.42, 0.42))) for x in (-0.55, 0.55)),
        *(Part("light", "oval", ((x, 0.35), (0.29, 0.29))) for x in (-0.55, 0.55)),
        Part("own", "bar", ((-0.55, 0.35), (-0.2, -0.3)), 0.1),
        Part("own", "bar", ((-0.2, -0.3), (0.42, -0.3)), 0.1),
        Part("own", "bar", ((0.0, 0.35), (0.42, -0.3)), 0.1),
        Part("own", "bar", ((-0.55, 0.35), (0.0, 0.35)), 0.1),
        Part("own", "bar", ((0.55, 0.35), (0.38, -0.55)), 0.1),
        Part("own", "bar", ((-0.42, -0.42), (-0.05, -0.42)), 0.12),
        Part("dark", "bar", ((0.28, -0.6), (0.6, -0.6)), 0.08),
    ),
    "boat": (
        Part("wood", "bar", ((0, 0.2), (0, -0.85)), 0.06),
        Part("light", "patch", ((0.08, 0.1), (0.08, -0.85), (0.7, 0.1))),
        Part("own", "patch", ((-0.1, 0.1), (-0.75, 0.1), (-0.1, -0.75))),
        Part("own", "patch", ((-0.65, 0.7), (-0.95, 0.2), (0.95, 0.2), (0.65, 0.7))),
    ),
    "plane": (
        Part("deep", "patch", ((-0.05, 0.0), (-0.5, -0.62), (-0.25, -0.62), (0.4, 0.0))),
        Part("own", "oval", ((0, 0), (0.95, 0.25))),
        Part("own", "patch", ((-0.6, -0.05), (-0.98, -0.6), (-0.7, -0.6), (-0.4, -0.1))),
        Part("own", "patch", ((0.35, 0.05), (-0.2, 0.8), (-0.5, 0.8), (-0.15, 0.05))),
        Part("glass", "oval", ((0.62, -0.08), (0.16, 0.1))),
    ),
    "balloon": (
        Part("own", "oval", ((0, -0.25), (0.66, 0.7))),
        Part("deep", "oval", ((0, -0.25), (0.24, 0.7))),
        Part("dark", "bar", ((-0.3, 0.35), (-0.16, 0.7)), 0.04),
        Part("dark", "bar", ((0.3, 0.35), (0.16, 0.7)), 0.04),
        Part("wood", "box", ((0, 0.8), (0.22, 0.16))),
    ),
    "dog": (
        *(Part("deep", "bar", ((x, 0.2), (x, 0.75)), 0.1, (way * 0.16, 0)) for x, way in ((-0.42, 1), (0.3, -1))),
        Part("own", "bar", ((-0.6, -0.05), (-0.9, -0.5)), 0.08, (0.1, 0)),
        Part("own", "oval", ((-0.1, 0.08), (0.62, 0.3))),
        *(Part("own", "bar", ((x, 0.2), (x, 0.75)), 0.1, (way * 0.16, 0)) for x, way in ((-0.55, -1), (0.42, 1))),
        Part("own", "oval", ((0.55, -0.35), (0.3, 0.26))),
        Part("own", "oval", ((0.82, -0.27), (0.18, 0.13))),
        Part("deep", "oval", ((0.4, -0.33), (0.12, 0.27))),
        Part("dark", "oval", ((0.96, -0.3), (0.07, 0.07))),
        Part("dark", "oval", ((0.64, -0.42), (0.06, 0.06))),
    ),
    "bird": (
        Part("deep", "patch", ((-0.5, 0.05), (-0.98, -0.12), (-0.98, 0.28))),
        Part("own", "oval", ((0, 0.1), (0.6, 0.3))),
        Part("own", "oval", ((0.52, -0.15), (0.26, 0.25))),
        Part("wood", "patch", ((0.7, -0.25), (1.0, -0.1), (0.7, 0.0))),
        Part("dark", "oval", ((0.58, -0.2), (0.07, 0.07))),
        Part("deep", "patch", ((0.22, 0.1), (-0.3, 0.15), (-0.35, -0.35)), swing=(0, 0.55)),
    ),
    "fish": (
        Part("deep", "patch", ((-0.45, 0.0), (-0.98, -0.5), (-0.98, 0.5)), swing=(0, -0.15)),
        Part("deep", "patch", ((-0.3, -0.3), (-0.05, -0.75), (0.3, -0.35))),
        Part("own", "oval", ((0.15, 0), (0.72, 0.45))),
        *(Part("light", "bar", ((x, -0.28), (x, 0.28)), 0.06) for x in (-0.15, 0.15)),
        Part("light", "oval", ((0.55, -0.12), (0.14, 0.14))),
        Part("dark", "oval", ((0.58, -0.12), (0.07, 0.07))),
    ),
    "hammer": (
        Part("wood", "bar", ((-0.62, 0.75), (0.25, -0.3)), 0.13),
        Part("own", "patch", ((-0.32, -0.55), (0.0, -0.9), (0.72, -0.2), (0.4, 0.15))),
        Part("own", "bar", ((0.5, -0.05), (0.72, 0.2)), 0.18),
    ),
}


def painted(
    thing: str,
    colour: tuple[float, float, float],
    x: Float[np.ndarray, "frames rows columns"],
    y: Float[np.ndarray, "frames rows columns"],
    beat: np.ndarray,
    pixel: float,
) -> tuple[Float[np.ndarray, "frames rows columns 3"], Float[np.ndarray, "frames rows columns 1"]]:
    """The colours of a thing with a dark outline, and how much of each pixel it covers.

    x, y: of each pixel's middle, in units of the sprite. pixel: the size of a pixel in these units.
    """
    own = np.asarray(colour, np.float32)
    image = np.full((*x.shape, 3), 0.06, np.float32)
    whole = np.full(x.shape, np.inf, np.float32)
    for part in SPRITES[thing]:
        distance = part.distance(x, y, beat) / np.float32(pixel)
        paint = own if part.paint == "own" else DEEP * own if part.paint == "deep" else np.asarray(PAINTS[part.paint])
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        image += cover * (paint.astype(np.float32) - image)
        np.minimum(whole, distance, out=whole)
    return image, np.clip(1.4 - whole, 0, 1)[..., None]
