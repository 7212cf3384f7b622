"""Qwen2.5-Omni's thinker, with transformers' classes."""

from fastav.models.qwen2_5_omni.adapter import Qwen25OmniAdapter

__all__ = ["Qwen25OmniAdapter"]
