"""CIDEr-D: the similarity of a caption to its reference, weighted towards word groups that few references share."""

import math
import re
from collections import Counter
from collections.abc import Sequence

LENGTHS = (1, 2, 3, 4)
SIGMA = 6.0


class CiderD:
    """CIDEr-D against one reference, in [0, 10].

    Source: Vedantam et al., arXiv:1411.5726, section 3 and the "D" variant of section 7 (clipped counts, a penalty for
    length with sigma 6). Deviation: words are split by a rule that follows the Penn treebank where captions need it,
    not by Stanford's Java tokenizer.
    """

    def __init__(self, references: Sequence[str]) -> None:
        """references: the corpus for the frequency of word groups."""
        groups = [grams for reference in references for grams in map(set, _grams(reference))]
        self._frequency = Counter(gram for grams in groups for gram in grams)
        self._log_references = math.log(max(1, len(references)))

    def score(self, caption: str, reference: str) -> float:
        """The similarity of the caption to the reference."""
        pairs = zip(_grams(caption), _grams(reference), strict=True)
        difference = len(words(caption)) - len(words(reference))
        penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
        return 10 * penalty * sum(self._similarity(*pair) for pair in pairs) / len(LENGTHS)

    def _similarity(self, caption: Counter[tuple[str, ...]], reference: Counter[tuple[str, ...]]) -> float:
        ours, theirs = self._weights(caption), self._weights(reference)
        norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        shared = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
        return shared / norms if norms else 0.0

    def _weights(self, grams: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        idf = {gram: self._log_references - math.log(max(1, self._frequency[gram])) for gram in grams}
        return {gram: count * idf[gram] for gram, count in grams.items()}


def words(text: str) -> list[str]:
    """Words in lower case without punctuation; "man's" is two words, "don't" is "do" and "n't", "t-shirt" is one."""
    spaced = re.sub(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b", r" \1", text.lower().replace("\u2019", "'"))
    return re.findall(r"n't|'\w+|\w+(?:-\w+)*", spaced)


def _grams(text: str) -> list[Counter[tuple[str, ...]]]:
    tokens = words(text)
    return [Counter(zip(*(tokens[i:] for i in range(length)), strict=False)) for length in LENGTHS]
