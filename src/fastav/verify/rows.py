"""The file of a verification: one JSON line per run that added to it, and one per question."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastav import row_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """An answer and its costs.

    text, finish: as in `fastav.Answer`. new_tokens: without the end marker. prompt_tokens: by modality, before pruning.
    kept: the share of the audio, video and image tokens that a layer runs on, mean over layers, by modality, and for
    `media` together. flops, kv_bytes: of the prefill, `full` and `pruned`. seconds: by phase. peak_bytes: as in
    `fastav.Answer`.
    """

    text: str
    finish: str
    new_tokens: int
    prompt_tokens: Mapping[str, int]
    kept: Mapping[str, float | int]
    flops: Mapping[str, int]
    kv_bytes: Mapping[str, int]
    seconds: Mapping[str, float | int]
    peak_bytes: int | None

    @property
    def whole(self) -> float:
        """Seconds of all phases."""
        return float(sum(self.seconds.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A plan's answer against the unpruned one.

    exact: whether the texts are equal. first_token: whether the first tokens are. rouge_l: in [0, 1]. kl: the
    divergence along the unpruned answer in nats, `mean` over its tokens and `max`. error: why there is no answer; the
    other fields are then empty.
    """

    answer: Measured | None = None
    exact: bool = False
    first_token: bool = False
    rouge_l: float | int = 0.0
    kl: Mapping[str, float | int] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One question, its unpruned answer, and the answers under every plan.

    id, clip, question, use: as in the file of questions. error: why there is no unpruned answer; `unpruned` and `plans`
    are then empty.
    """

    id: str | int
    clip: str
    question: str
    use: str
    unpruned: Measured | None = None
    plans: Mapping[str, Compared] = field(default_factory=dict)
    error: str | None = None

    @property
    def key(self) -> str | int:
        """The id, which identifies a row."""
        return self.id

    @property
    def failures(self) -> list[tuple[str, str]]:
        """The plans without an answer (or `unpruned`), and why."""
        if self.error is not None:
            return [("unpruned", self.error)]
        return [(name, compared.error) for name, compared in self.plans.items() if compared.error is not None]


Results = row_files.Results[Row]
RowFile = row_files.RowFile[Row]


def open_rows(path: Path, run: Mapping[str, Any]) -> AbstractContextManager[RowFile]:
    """Open a file to append the rows of this run. Existing rows are kept, except an incomplete last line.

    run: as `Verification.head` returns it.
    Raises: FastAVError if the file is of another verification, or of none; OSError.
    """
    return FORMAT.open(path, run)


def read(path: Path) -> Results:
    """The content of a file of rows.  Raises: FastAVError."""
    return FORMAT.read(path)


def _parse(entry: dict[str, Any]) -> Row:
    plans = {name: _parse_compared(compared) for name, compared in entry.pop("plans").items()}
    unpruned = entry.pop("unpruned")
    return Row(**entry, unpruned=None if unpruned is None else _parse_measured(unpruned), plans=plans)


def _parse_compared(entry: dict[str, Any]) -> Compared:
    answer = entry.pop("answer")
    compared = Compared(**entry, answer=None if answer is None else _parse_measured(answer))
    if compared.error is None and (answer is None or not {"mean", "max"} <= compared.kl.keys()):
        raise ValueError("a plan needs an answer, and kl with mean and max, or an error")
    return compared


def _parse_measured(entry: dict[str, Any]) -> Measured:
    measured = Measured(**entry)
    if not all({"full", "pruned"} <= saving.keys() for saving in (measured.flops, measured.kv_bytes)):
        raise ValueError("flops and kv_bytes need full and pruned")
    return measured


FORMAT = row_files.RowFormat(
    command="fastav verify",
    key="fastav_verify",
    version=1,
    same=("model", "device", "dtype", "questions", "max_new_tokens"),
    required=("n_questions",),
    parse=_parse,
)
