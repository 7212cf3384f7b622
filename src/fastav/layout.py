"""Layouts: the modality of every token of a prompt, the clip it is of, its time and place there, and its padding.

A layout is host data and needs no weights, so that the number of tokens of every layer is known before anything runs
on a device.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Float, Int

from fastav.compatibility import require_tested
from fastav.formatting import plural

require_tested("numpy")


class Modality(IntEnum):
    """The kind of content that a token represents."""

    TEXT = 0
    AUDIO = 1
    VIDEO = 2
    IMAGE = 3

    @property
    def label(self) -> str:
        """The lower-case name, as plans and reports write it."""
        return self.name.lower()


MEDIA = (Modality.AUDIO, Modality.VIDEO, Modality.IMAGE)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """The tokens of one prompt, in order, without the padding of a batch.

    modality: a `Modality` per token.
    item: index of the clip, sound or image of the prompt that the token is of, counted from 0; -1 for text. A clip's
    video and sound are one item.
    second: start of the token's content in its clip, in seconds; NaN if it has none or is unknown.
    frame: index in its clip of the (first) sampled frame that the token shows or accompanies; -1 for none.
    padding: True for a token that is known to encode only padding, such as silence up to 30 s.
    box: the part of its frame that a token shows, as top, left, bottom and right, in shares of the height and width of
    the frame as it is in the clip, from 0 to 1. It is the area whose patches become the token; an encoder's attention
    and convolutions see more. NaN for text, sound and separators, for tokens that show no part of a frame, and where it
    is unknown. A token of several frames has the same box in all of them.
    """

    modality: Int[np.ndarray, " tokens"]
    item: Int[np.ndarray, " tokens"]
    second: Float[np.ndarray, " tokens"]
    frame: Int[np.ndarray, " tokens"]
    padding: Bool[np.ndarray, " tokens"]
    box: Float[np.ndarray, "tokens 4"]

    def __post_init__(self) -> None:
        for name in self.__slots__:
            getattr(self, name).setflags(write=False)

    @classmethod
    def of(
        cls,
        modality: Modality,
        tokens: int,
        *,
        item: Int[np.ndarray, " tokens"] | None = None,
        second: Float[np.ndarray, " tokens"] | None = None,
        frame: Int[np.ndarray, " tokens"] | None = None,
        padding: Bool[np.ndarray, " tokens"] | None = None,
        box: Float[np.ndarray, "tokens 4"] | None = None,
    ) -> "Layout":
        """A run of `tokens` tokens of one modality.  item: by default 0, or -1 for text."""
        alone = -1 if modality == Modality.TEXT else 0
        return cls(
            modality=np.full(tokens, modality, dtype=np.int8),
            item=np.full(tokens, alone, np.int32) if item is None else item.astype(np.int32),
            second=np.full(tokens, np.nan, np.float32) if second is None else second.astype(np.float32),
            frame=np.full(tokens, -1, np.int32) if frame is None else frame.astype(np.int32),
            padding=np.zeros(tokens, bool) if padding is None else padding.astype(bool),
            box=np.full((tokens, 4), np.nan, np.float32) if box is None else box.astype(np.float32),
        )

    @classmethod
    def join(cls, parts: Iterable["Layout"]) -> "Layout":
        """Concatenate layouts."""
        parts = list(parts)
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in cls.__slots__})

    def __len__(self) -> int:
        return len(self.modality)

    def __repr__(self) -> str:
        kinds = " + ".join(f"{n:,} {label}" for label, n in self.by_modality().items())
        parts = [plural(self.items, "item")] if self.items > 1 else []
        if n_frames := len(np.unique(np.stack([self.item, self.frame])[:, self.frame >= 0], axis=1).T):
            parts.append(plural(n_frames, "frame"))
        if (seconds := self.second[~np.isnan(self.second)]).size:
            parts.append(f"{seconds.min():.1f} to {seconds.max():.1f} s")
        if padding := int(self.padding.sum()):
            parts.append(f"{padding:,} padding")
        return f"Layout({', '.join([plural(len(self), 'token'), *filter(None, [kinds]), *parts])})"

    @property
    def items(self) -> int:
        """Number of clips, sounds and images in the prompt."""
        return int(self.item.max(initial=-1)) + 1

    def count(self, *modalities: Modality) -> int:
        """Number of tokens of any of these modalities."""
        return int(np.isin(self.modality, modalities).sum())

    def by_modality(self) -> dict[str, int]:
        """Number of tokens of each modality that occurs, keyed by label."""
        return {m.label: n for m in Modality if (n := self.count(m))}
