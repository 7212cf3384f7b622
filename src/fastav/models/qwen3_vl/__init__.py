"""Qwen3-VL, dense and sparse, with transformers' classes."""

from fastav.models.qwen3_vl.adapter import Qwen3VLAdapter

__all__ = ["Qwen3VLAdapter"]
