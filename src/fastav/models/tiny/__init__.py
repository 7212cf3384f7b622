"""The embedded model: a small model in the package."""

from fastav.models.tiny.adapter import TinyAdapter
from fastav.models.tiny.modeling import FastAVTinyForConditionalGeneration

__all__ = ["FastAVTinyForConditionalGeneration", "TinyAdapter"]
