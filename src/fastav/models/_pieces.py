"""Which video, image or sound of its prompt each media token is of, and the layout that follows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int

from fastav.errors import MediaError
from fastav.layout import Layout, Modality
from fastav.models._adapters import layout_from_masks

Joins = Callable[[Modality, Modality, bool], bool]
"""Whether a piece is of the same item as the piece before it, from both modalities and whether they touch."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """A medium of a request, decoded and sampled as its family takes it.

    parts: the content parts that stand for it in the chat template, in the order of its videos, images and sounds.
    videos, images, sounds: what the processor gets; images may be the frames of a video. is_image: whether the medium
    is an image. seconds: start of each sampled frame. start: of the sound.
    """

    parts: Sequence[Any]
    videos: Sequence[Any] = ()
    images: Sequence[Any] = ()
    sounds: Sequence[Any] = ()
    is_image: bool = False
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(0))
    start: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pieces:
    """The media tokens of one prompt: for each token, the piece that it is of. All arrays are [tokens].

    video, image, audio: index of the video, image or sound that the processor got, counted in the prompt; -1 for none.
    frame: index in its video of the first sampled frame that a video token shows; -1 where unknown. padding: as in
    `Layout`. joins: which pieces make one item, as far as the tokens show it. box: as in `Layout`; None if unknown.
    framed_images: whether the images of an item are its frames.
    """

    video: Int[np.ndarray, " tokens"]
    image: Int[np.ndarray, " tokens"]
    audio: Int[np.ndarray, " tokens"]
    frame: Int[np.ndarray, " tokens"]
    joins: Joins
    padding: Bool[np.ndarray, " tokens"] | None = None
    box: Float32[np.ndarray, "tokens 4"] | None = None
    framed_images: bool = False

    def layout(self, samples: Sequence[Sample] | None = None) -> Layout:
        """The layout of the prompt, whose seconds are unknown.

        samples: the request's media; None if only the tokens are known.
        """
        item = self._items_in_order() if samples is None else self._items_of(samples)
        frame = self.frame
        if self.framed_images:
            frame = np.where(self.image >= 0, _numbers_within(self.image, item), frame)
        frame = np.where(self.audio >= 0, _last_frames(frame, item, self.video >= 0), frame)
        layout = layout_from_masks(
            self.video >= 0,
            self.audio >= 0,
            image=self.image >= 0,
            frame=frame,
            padding=self.padding,
            box=self.box,
        )
        return replace(layout, item=item.astype(np.int32))

    def sound_numbers(self, layout: Layout) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
        """For each audio token, the number of its sound among those of its item, and its own number in the sound."""
        return _numbers_within(self.audio, layout.item), run_index(self.audio)

    def _items_of(self, samples: Sequence[Sample]) -> np.ndarray:
        """The item of each token, from the number of pieces of each medium.  Raises: MediaError if they differ."""
        item = np.full(len(self.video), -1)
        for piece, name in ((self.video, "videos"), (self.image, "images"), (self.audio, "sounds")):
            owners = [index for index, sample in enumerate(samples) for _ in getattr(sample, name)]
            if piece.max(initial=-1) + 1 != len(owners):
                raise MediaError(
                    f"the prompt has {piece.max(initial=-1) + 1} {name}, and the request {len(owners)}",
                    "does the chat template of this checkpoint show every part of a message?",
                )
            item = np.where(piece >= 0, np.array([*owners, -1])[piece], item)
        return item

    def _items_in_order(self) -> np.ndarray:
        """The item of each token, from the order of the pieces."""
        pieces = [
            (*_span(piece, index), modality, piece == index)
            for piece, modality in (
                (self.video, Modality.VIDEO),
                (self.image, Modality.IMAGE),
                (self.audio, Modality.AUDIO),
            )
            for index in range(piece.max(initial=-1) + 1)
        ]
        item, number, last, previous = np.full(len(self.video), -1), -1, -2, None
        for first, end, modality, member in sorted(pieces, key=lambda piece: piece[:2]):
            if previous is None or not self.joins(previous, modality, first <= last + 1):
                number += 1
            item[member] = number
            last, previous = max(last, end), modality
        return item


def run_index(piece: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
    """The number of each token among those of its piece, in order; -1 for tokens of none."""
    index = np.full(len(piece), -1)
    for number in range(piece.max(initial=-1) + 1):
        member = piece == number
        index[member] = np.arange(member.sum())
    return index


def pieces_of_lengths(member: Bool[np.ndarray, " tokens"], lengths: Iterator[int]) -> Int[np.ndarray, " tokens"]:
    """The piece of each token of the mask, from the lengths of the next pieces of a batch; -1 elsewhere.

    Without lengths, or if they do not fit, all tokens are of one piece.
    """
    total, parts = int(member.sum()), list[int]()
    while sum(parts) < total and (length := next(lengths, None)) is not None:
        parts.append(int(length))
    piece = np.full(len(member), -1)
    piece[member] = np.repeat(np.arange(len(parts)), parts) if sum(parts) == total else 0
    return piece


def sounds_touch(previous: Modality, modality: Modality, touches: bool) -> bool:
    """A sound is of the video that it touches: families whose video and sound alternate without a mark between."""
    return previous is Modality.VIDEO and modality is Modality.AUDIO and touches


def follows_frame(previous: Modality, modality: Modality, touches: bool) -> bool:
    """An image is of the clip of the image before it, and a sound of what is before it.

    For families that take the frames of a video as images.
    """
    return modality is Modality.AUDIO or previous is Modality.IMAGE


def _span(piece: np.ndarray, index: int) -> tuple[int, int]:
    tokens = np.flatnonzero(piece == index)
    return (int(tokens[0]), int(tokens[-1])) if len(tokens) else (len(piece), len(piece))


def _numbers_within(piece: np.ndarray, item: np.ndarray) -> np.ndarray:
    """The number of each token's piece among those of its item; -1 for tokens of none."""
    number = np.full(len(piece), -1)
    for one in _present(item[piece >= 0]):
        member = (item == one) & (piece >= 0)
        number[member] = np.unique(piece[member], return_inverse=True)[1].ravel()
    return number


def _last_frames(frame: np.ndarray, item: np.ndarray, video: np.ndarray) -> np.ndarray:
    """The frame of the last video token of the same item up to each token; -1 if there is none."""
    last = np.full(len(frame), -1)
    for one in _present(item):
        member = item == one
        place = np.maximum.accumulate(np.where(video[member], np.arange(member.sum()), -1))
        last[member] = np.append(frame[member], -1)[place]
    return last


def _present(item: np.ndarray) -> Iterable[int]:
    return np.unique(item[item >= 0]).tolist()
