"""Agreement of an answer with the unpruned model's.  Pure functions; docs/verify.md defines the measures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# scripts without spaces between words: Thai, Lao, Khmer, Japanese, Chinese
UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """An answer against the unpruned one.

    exact: whether the texts are equal. first_token: whether the first tokens are, or neither has one. rouge_l: in
    [0, 1].
    """

    exact: bool
    first_token: bool
    rouge_l: float

    @classmethod
    def of(cls, text: str, token_ids: Sequence[int], reference: str, reference_ids: Sequence[int]) -> "Agreement":
        """The agreement of an answer, its text and tokens, with the unpruned one, its text and tokens."""
        return cls(
            exact=text == reference,
            first_token=list(token_ids[:1]) == list(reference_ids[:1]),
            rouge_l=rouge_l(text, reference),
        )


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation; each character of a script without spaces is one."""
    return _WORD.findall(text.casefold())


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: the F1 of the longest common subsequence of words; 1 if neither text has a word.

    Source: Lin (2004), section 3.1, with beta = 1; differs: no stemming, and words of any script.
    """
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * longest_common_subsequence(ours, theirs) / (len(ours) + len(theirs))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest sequence that both contain in order, with gaps allowed."""
    row = [0] * (len(second) + 1)  # of the prefix of `first` so far, by the length of the prefix of `second`
    for item in first:
        diagonal = 0
        for index, other in enumerate(second):
            above = row[index + 1]
            row[index + 1] = diagonal + 1 if item == other else max(above, row[index])
            diagonal = above
    return row[-1]
