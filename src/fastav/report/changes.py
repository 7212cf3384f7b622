"""The words that differ between two texts."""

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import groupby

from fastav.agreement import UNSPACED

Segment = tuple[str, bool]  # a part of a text, and whether it differs

# a word, a character of a script without spaces, a sign, or spaces
_PARTS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]|\s+")


def changed_words(before: str, after: str) -> tuple[list[Segment], list[Segment]]:
    """The segments of two texts, with the words and signs marked that only one of them has.

    Case counts; spaces do not, but those between two marked words are marked with them.
    """
    parts = _PARTS.findall(before), _PARTS.findall(after)
    places = [[index for index, part in enumerate(one) if not part.isspace()] for one in parts]
    words = [[one[index] for index in here] for one, here in zip(parts, places, strict=True)]
    marked = [[False] * len(one) for one in parts]
    for kind, *spans in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, (first, end) in enumerate((spans[:2], spans[2:])):
            if kind != "equal" and first < end:
                start, stop = places[side][first], places[side][end - 1] + 1
                marked[side][start:stop] = [True] * (stop - start)
    first, second = (list(_segments(one, flags)) for one, flags in zip(parts, marked, strict=True))
    return first, second


def _segments(parts: list[str], marked: list[bool]) -> Iterator[Segment]:
    for is_marked, group in groupby(zip(parts, marked, strict=True), key=lambda one: one[1]):
        yield "".join(part for part, _ in group), is_marked
