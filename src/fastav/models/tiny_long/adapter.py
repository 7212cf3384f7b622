"""What the rest of fastav must know about the embedded model for long clips."""

from importlib.resources import files
from typing import ClassVar

from fastav.models.tiny import TinyAdapter
from fastav.models.tiny_long.modeling import FastAVTinyLongForConditionalGeneration


class TinyLongAdapter(TinyAdapter):
    """The weights of `tiny` with eight times as many frames and 32 s of sound: over a thousand tokens of a clip."""

    name = "tiny-long"
    architectures = frozenset({FastAVTinyLongForConditionalGeneration.__name__})
    checkpoint = str(files("fastav") / "assets" / "tiny-long")
    model_class: ClassVar[type[FastAVTinyLongForConditionalGeneration]] = FastAVTinyLongForConditionalGeneration
