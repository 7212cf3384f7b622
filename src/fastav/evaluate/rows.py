"""The file of an evaluation: one JSON line per run that added to it, and one per answer."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastav import row_files

VERSION = 3  # 1 had no kl, 2 no retention


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The answer of one plan to one sample.

    gold: the sample's answer. score: in [0, 1]. prompt_tokens: by modality, before pruning. flops, kv_bytes: of the
    prefill, `full` and `pruned`. seconds: by phase. kl: the divergence from the unpruned model along its answer, `mean`
    over tokens and `max`, in nats (None: not measured). retention: as `Answer.mean_retention`; None in files of earlier
    versions, too. error: why there is no answer; the fields after `gold` are then
    empty.
    """

    task: str
    sample: str
    family: str
    plan: str
    fingerprint: str
    gold: str
    answer: str = ""
    score: float | int = 0
    parsed: bool = False
    prompt_tokens: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)
    kv_bytes: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float | int] = field(default_factory=dict)
    new_tokens: int = 0
    kl: Mapping[str, float | int] | None = None
    retention: float | int | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Sample and plan, which identify a row."""
        return self.sample, self.plan


Results = row_files.Results[Row]
RowFile = row_files.RowFile[Row]


def open_rows(path: Path, run: Mapping[str, Any]) -> AbstractContextManager[RowFile]:
    """Open a file to append the rows of this run. Existing rows are kept, except an incomplete last line.

    run: as `Evaluation.head` returns it.
    Raises: FastAVError if the file is of another evaluation, or of none; OSError.
    """
    return FORMAT.open(path, run)


def read(path: Path) -> Results:
    """The content of a file of rows.  Raises: FastAVError."""
    return FORMAT.read(path)


def _parse_row(entry: dict[str, Any]) -> Row:
    later: dict[str, Any] = {name: entry.get(name) for name in ("kl", "retention")}
    row = Row(**{f.name: entry[f.name] for f in fields(Row) if f.name not in later}, **later)
    if row.error is None and not all({"full", "pruned"} <= saving.keys() for saving in (row.flops, row.kv_bytes)):
        raise ValueError("flops and kv_bytes need full and pruned")
    if row.kl is not None and not {"mean", "max"} <= row.kl.keys():
        raise ValueError("kl needs mean and max")
    return row


FORMAT = row_files.RowFormat(
    command="fastav eval",
    key="fastav_eval",
    version=VERSION,
    same=("task", "model", "device", "dtype"),
    required=("families",),
    parse=_parse_row,
)
