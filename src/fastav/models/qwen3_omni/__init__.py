"""Qwen3-Omni's thinker, a mixture of experts, with transformers' classes."""

from fastav.models.qwen3_omni.adapter import Qwen3OmniAdapter

__all__ = ["Qwen3OmniAdapter"]
