"""Multiple choice: formatting options, and parsing the letter of an answer."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from fastav.task import Grade, Sample
from fastav.tasks._annotations import Annotation
from fastav.tasks._published import PublishedTask

LETTERS = ascii_uppercase
INSTRUCTION = "Answer with the letter of the right option only."

_PREFIX = r"(?:(?:the\s+)?(?:(?:best|correct|right)\s+)?(?:answer|option|choice)(?:\s+is)?(?:\s*:\s*|\s+))?"
_LETTER = re.compile(_PREFIX + r"\(?([a-z])\)?[.:,]?")
_LINE = re.compile(_PREFIX + r"(?:\(([a-z])\)[.:]?|([a-z])[.:)])\s+(.+)", re.DOTALL)


def parse(text: str, options: Sequence[str]) -> str | None:
    """The letter of an answer, or None.

    Accepted are a letter of an option (`B`, `b.`, `(B)`, `Answer: B`, `The answer is B`), alone or as `B. ` before that
    option's own text, and the exact text of one option. Case is ignored, and so are spaces, quotes, asterisks and full
    stops at the ends.
    """
    answer, plain = _plain(text), [_plain(option) for option in options]
    if match := _LETTER.fullmatch(answer):
        letter = match[1].upper()
        if letter in LETTERS[: len(options)]:
            return letter
    if match := _LINE.fullmatch(answer):
        index = LETTERS.index((match[1] or match[2]).upper())
        if index < len(options) and match[3] == plain[index]:
            return LETTERS[index]
    if answer and plain.count(answer) == 1:
        return LETTERS[plain.index(answer)]
    return None


def strip_letters(options: Sequence[str]) -> tuple[str, ...]:
    """Options without their leading letters ("A. ", "B) ", ...), if every option starts with its own letter."""
    matches = [re.fullmatch(rf"\(?{LETTERS[i]}[.:)]\s*(.*)", option, re.DOTALL) for i, option in enumerate(options)]
    return tuple(match[1].strip() for match in matches if match) if all(matches) else tuple(options)


def format_question(question: str, options: Sequence[str], before: str = "", after: str = INSTRUCTION) -> str:
    """The question, its options with letters, one per line, and instructions before and after."""
    lettered = [f"{LETTERS[i]}. {option}" for i, option in enumerate(options)]
    return "\n".join(part for part in (before, question, *lettered, after) if part)


def answer_letter(row: Annotation, column: str, options: Sequence[str]) -> str:
    """The letter in this column.  Raises: TaskError if no option has it."""
    letter = row.text(column)
    if letter not in tuple(LETTERS[: len(options)]):
        raise row.error(f"{column!r} must be the letter of one of {len(options)} options, got {letter!r}")
    return letter


class ChoiceTask(PublishedTask):
    """A benchmark with options; an answer is correct if it names the right letter.

    Deviation: an answer without a letter is unparsed and scores 0; some harnesses count it as "A".
    """

    def grade(self, sample: Sample, text: str) -> Grade:
        """1 for the right letter, else 0; not parsed if the answer names no letter."""
        letter = parse(text, sample.options)
        return Grade(0, parsed=False) if letter is None else Grade(int(letter == sample.answer))


def _plain(text: str) -> str:
    return text.strip(" \t\r\n.*\"'`").lower()
