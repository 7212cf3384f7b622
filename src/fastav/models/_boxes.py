"""The part of a frame that each token of a grid shows, as `fastav.Layout.box`."""

import numpy as np
from jaxtyping import Bool, Float32

Boxes = Float32[np.ndarray, "_ 4"]


def grid_boxes(rows: int, columns: int, *, height: float | int = 1, width: float | int = 1) -> Boxes:
    """The boxes of `rows` x `columns` equal tokens, row by row from the top left.

    height, width: shares of the frame that a row and a column would have if the grid had one of each: more than 1 where
    the grid goes past the frame, whose boxes are clipped to it, less than 1 where it leaves out an end of the frame. A
    token that is wholly past the frame has NaN.
    """
    top, left = (
        edges.ravel()
        for edges in np.meshgrid(
            np.arange(rows) * (height / max(1, rows)), np.arange(columns) * (width / max(1, columns)), indexing="ij"
        )
    )
    boxes = np.stack([top, left, top + height / max(1, rows), left + width / max(1, columns)], axis=1)
    outside = (top >= 1 - 1e-9) | (left >= 1 - 1e-9)
    return np.where(outside[:, None], np.nan, boxes.clip(0, 1)).astype(np.float32)


def with_line_ends(boxes: Boxes, rows: int) -> Boxes:
    """The boxes of a grid of so many rows, with a token that shows nothing after each row."""
    ends = np.full((rows, 1, 4), np.nan, np.float32)
    return np.concatenate([boxes.reshape(rows, -1, 4), ends], axis=1).reshape(-1, 4)


def placed(boxes: Boxes, member: Bool[np.ndarray, " prompt"]) -> Float32[np.ndarray, "prompt 4"]:
    """The boxes of the tokens of a mask, in order; NaN elsewhere, and everywhere if there are not as many."""
    box = np.full((len(member), 4), np.nan, np.float32)
    if len(boxes) == member.sum():
        box[member] = boxes
    return box
