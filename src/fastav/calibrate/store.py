"""A calibration on disk: its settings, a file per prompt and per pair of answers, and the result."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, UInt8

from fastav.calibrate.answers import AnswerPair, Comparison
from fastav.errors import CalibrationError, reason_of
from fastav.files import atomic_write
from fastav.layout import Layout, Modality
from fastav.trace import Trace

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preview:
    """A small preview of a clip.

    frames: pictures at `moments`, in seconds. peaks: the lowest and highest value of the waveform in equal parts of
    `duration`, which is in seconds. Both can be empty.
    """

    frames: UInt8[np.ndarray, "pictures height width 3"]
    moments: Float[np.ndarray, " pictures"]
    peaks: Float[np.ndarray, "2 parts"]
    duration: float | int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """A traced prompt."""

    clip: str
    question: str
    trace: Trace
    preview: Preview


class Store:
    """The folder of a calibration.  Its files are written atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, head: Mapping[str, Any]) -> None:
        """Reserve the folder for a calibration with these settings.

        Raises: CalibrationError if it has a calibration with other settings, or other files.
        """
        if (path := self.folder / "calibration.json").exists():
            existing = self.head()
            if changed := [key for key, value in head.items() if existing.get(key) != value]:
                key = changed[0]
                raise CalibrationError(
                    f"{self.folder} has a calibration with {key} {existing.get(key)!r}, not {head[key]!r}",
                    "give another folder, or delete that one",
                )
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise CalibrationError(f"{self.folder} is a file", "give a folder")
        if self.folder.exists() and any(one.suffix != ".part" for one in self.folder.iterdir()):
            raise CalibrationError(f"{self.folder} has other files", "give an empty folder, or a new one")
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(json.dumps({"fastav_calibration": VERSION, **head}, indent=2) + "\n", encoding="utf-8")

    def head(self) -> dict[str, Any]:
        """The settings that `begin` stored.  Raises: CalibrationError."""
        return self._json("calibration.json")

    def result(self) -> dict[str, Any]:
        """The result that `finish` stored.  Raises: CalibrationError."""
        return self._json("result.json")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Store the result."""
        with atomic_write(self.folder / "result.json") as part:
            part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    def has(self, key: str) -> bool:
        """Whether a prompt has a trace."""
        return self._path(key).exists()

    def save(self, key: str, record: Record) -> None:
        """Store the record of a prompt."""
        trace, preview = record.trace, record.preview
        fields = {"clip": record.clip, "question": record.question, "seconds": dict(trace.seconds)}
        arrays = {f"layout_{name}": getattr(trace.layout, name) for name in Layout.__slots__}
        arrays |= {f"kept_{layer}": indices for layer, indices in trace.selections}
        arrays |= {"attention": trace.attention, "rollout": trace.rollout}
        arrays |= {"frames": preview.frames, "moments": preview.moments, "peaks": preview.peaks}
        self._path(key).parent.mkdir(exist_ok=True)
        with atomic_write(self._path(key)) as part, part.open("wb") as file:
            np.savez(file, told=json.dumps(fields), duration=preview.duration, **arrays)

    def load(self, key: str) -> Record:
        """The record of a prompt.  Raises: CalibrationError if its file cannot be read."""
        try:
            with self._path(key).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                fields = json.loads(str(file["told"]))
                selections = sorted((int(name[5:]), file[name]) for name in file.files if name.startswith("kept_"))
                trace = Trace(
                    layout=_layout_of(file),
                    attention=file["attention"],
                    rollout=file["rollout"],
                    selections=tuple(selections),
                    seconds=fields["seconds"],
                )
                preview = Preview(
                    frames=file["frames"],
                    moments=file["moments"],
                    peaks=file["peaks"],
                    duration=float(file["duration"]),
                )
                return Record(clip=fields["clip"], question=fields["question"], trace=trace, preview=preview)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, BadZipFile, EOFError) as error:
            raise CalibrationError(
                f"cannot read {self._path(key)}: {reason_of(error)}", "delete it and calibrate again"
            ) from None

    def has_pair(self, key: str) -> bool:
        """Whether a pair of answers is stored."""
        return self._pair_path(key).exists()

    def save_pair(self, key: str, pair: AnswerPair) -> None:
        """Store a pair of answers."""
        self._pair_path(key).parent.mkdir(exist_ok=True)
        with atomic_write(self._pair_path(key)) as part:
            part.write_text(json.dumps(asdict(pair)) + "\n", encoding="utf-8")

    def load_pair(self, key: str) -> AnswerPair:
        """A pair of answers.  Raises: CalibrationError if its file cannot be read."""
        try:
            pair = AnswerPair(**json.loads(self._pair_path(key).read_text(encoding="utf-8")))
            Comparison(pairs=(pair,), traced=1, max_new_tokens=1).summary()  # fails if something is missing
            return pair
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CalibrationError(
                f"cannot read {self._pair_path(key)}: {reason_of(error)}", "delete it and calibrate again"
            ) from None

    def comparison(self) -> Comparison | None:
        """The answers of the finished calibration; None if it has none, as those that earlier versions have made.

        Raises: CalibrationError.
        """
        entry = self.result().get("comparison")
        if entry is None:
            return None
        try:
            keys, failures = list(entry["pairs"]), [(str(a), str(b), str(c)) for a, b, c in entry["failures"]]
            numbers = {name: int(entry[name]) for name in ("traced", "max_new_tokens")}
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{self.folder / 'result.json'} is not what a calibration writes: {reason_of(error, with_type=True)}",
                "calibrate again",
            ) from None
        return Comparison(pairs=tuple(map(self.load_pair, keys)), failures=tuple(failures), **numbers)

    def _path(self, key: str) -> Path:
        return self.folder / "prompts" / f"{key}.npz"

    def _pair_path(self, key: str) -> Path:
        return self.folder / "answers" / f"{key}.json"

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CalibrationError(f"{self.folder} has no finished calibration", "run fastav calibrate") from None
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"cannot read {path}: {reason_of(error)}", "delete the folder and calibrate again"
            ) from None
        if not isinstance(data, dict):
            raise CalibrationError(f"{path} is not a calibration", "delete the folder and calibrate again")
        if name == "calibration.json" and data.get("fastav_calibration") != VERSION:
            raise CalibrationError(f"{path} has the format version {data.get('fastav_calibration')!r}, not {VERSION}")
        return data


def _layout_of(file: Mapping[str, np.ndarray]) -> Layout:
    """The layout in a prompt's file; files of versions before 0.3 have no `item` and no `box`, and show one clip."""
    arrays = {name: file[f"layout_{name}"] for name in Layout.__slots__ if name not in ("item", "box")}
    modality = arrays["modality"]
    item = file["layout_item"] if "layout_item" in file else np.where(modality == Modality.TEXT, -1, 0)
    box = file["layout_box"] if "layout_box" in file else np.full((len(modality), 4), np.nan, np.float32)
    return Layout(**arrays, item=item.astype(np.int32), box=box)
