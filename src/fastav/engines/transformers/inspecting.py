"""Inspections: the cuts of one prefill as they were made, and the text of each text token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from fastav.inspection import Cut
from fastav.layout import Layout, Modality
from fastav.pruning.state import CutRecord

MOST_PARTS = 8  # tokens of one character; a run that is none is given up after so many
BROKEN = "\N{REPLACEMENT CHARACTER}"


class CutRecorder:
    """The cuts of a prefill of one prompt, in host memory.  Pass it to `Pruning.record_cuts`."""

    def __init__(self) -> None:
        self.cuts: list[Cut] = []

    def __call__(self, record: CutRecord) -> None:
        """Keep the record of a cut."""
        is_candidate = record.is_candidate[0].cpu().numpy()
        self.cuts.append(
            Cut(
                layer=record.layer,
                method=record.method,
                is_cache_only=record.is_cache_only,
                tokens=record.slots[0].cpu().numpy()[is_candidate],
                scores=record.scores[0].float().cpu().numpy()[is_candidate],
                kept=record.is_kept[0].cpu().numpy()[is_candidate],
            )
        )


def token_texts(tokenizer: Any, ids: Int[np.ndarray, " tokens"], layout: Layout) -> Sequence[str | None]:
    """The text of each text token of a prompt, None for others.

    Tokenizers write some tokens in another way at the start of a text, so each is decoded behind the one before it.
    Tokens of one character have the empty text, but the last, which has the character.
    """
    texts: list[str | None] = [None] * len(ids)
    before, parts = list[int](), list[int]()
    for index, token in enumerate(ids.tolist()):
        if layout.modality[index] != Modality.TEXT:
            before, parts = [], []
            continue
        parts.append(token)
        text = _added(tokenizer, before, parts)
        if text.endswith(BROKEN) and len(parts) < MOST_PARTS:
            texts[index] = ""
            continue
        texts[index] = text
        before, parts = parts, []
    return texts


def _added(tokenizer: Any, before: list[int], parts: list[int]) -> str:
    """What tokens add to the text of those before them."""
    start, whole = _decoded(tokenizer, before), _decoded(tokenizer, [*before, *parts])
    return whole[len(start) :] if whole.startswith(start) else _decoded(tokenizer, parts)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    known = [token for token in ids if token < len(tokenizer)]  # models add embeddings that no text stands for
    return tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False) if known else ""
