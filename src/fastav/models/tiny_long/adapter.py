"""The adapter of the embedded model for long clips."""

from importlib.resources import files
from typing import ClassVar

from fastav.models.tiny import TinyAdapter
from fastav.models.tiny_long.modeling import FastAVTinyLongForConditionalGeneration


class TinyLongAdapter(TinyAdapter):
    """The weights of `tiny` with eight times as many frames and 32 s of audio: over a thousand tokens per clip."""

    name = "tiny-long"
    architectures = frozenset({FastAVTinyLongForConditionalGeneration.__name__})
    checkpoint = str(files("fastav") / "assets" / "tiny-long")
    model_class: ClassVar[type[FastAVTinyLongForConditionalGeneration]] = FastAVTinyLongForConditionalGeneration
