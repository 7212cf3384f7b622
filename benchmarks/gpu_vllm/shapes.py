"""The random models, written once into a cache."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.load import checkpoints
from fastav.errors import FastAVError

VERSION = 1  # of what is written: a cache may hold what an earlier version wrote
SMALL_DECODER: Mapping[str, Any] = {
    **checkpoints.DECODER,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model to write.  write: writes it into a folder, weights drawn on a device. size: bytes on disk, about."""

    name: str
    write: Callable[[Path, torch.device], None]
    size: int


SMALL = Shape(name="small", write=lambda folder, _: checkpoints.write_omni(folder, SMALL_DECODER), size=30_000_000)
OMNI = Shape(name="qwen2-5-omni-7b", write=checkpoints.write_omni_7b, size=18_000_000_000)
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in (OMNI, SMALL)}


def default_cache() -> Path:
    """The folder for checkpoints, unless another one is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastav" / "random-models"


def checkpoint(shape: Shape, cache: Path, device: torch.device) -> Path:
    """The folder of a model, which is written if the cache does not have it.

    Raises: FastAVError if there is no room.
    """
    folder = cache / f"{shape.name}-v{VERSION}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if free < 1.1 * shape.size:
            raise FastAVError(
                f"{cache} has {free / 1e9:.0f} GB free, and {shape.name} takes {shape.size / 1e9:.0f} GB", "--cache DIR"
            )
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=cache) as part:  # half a model is never taken for one
            shape.write(Path(part), device)
            Path(part).chmod(0o755)
            Path(part).rename(folder)
            Path(part).mkdir()  # what the context removes
    except OSError as error:
        raise FastAVError(f"cannot write {folder}: {error.strerror or error}", "--cache DIR") from None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return folder
