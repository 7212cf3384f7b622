"""The embedded model for clips of 32 s."""

from fastav.models.tiny_long.adapter import TinyLongAdapter
from fastav.models.tiny_long.modeling import FastAVTinyLongForConditionalGeneration

__all__ = ["FastAVTinyLongForConditionalGeneration", "TinyLongAdapter"]
