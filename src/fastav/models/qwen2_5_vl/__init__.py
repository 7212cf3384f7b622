"""Qwen2.5-VL, with transformers' classes."""

from fastav.models.qwen2_5_vl.adapter import Qwen25VLAdapter

__all__ = ["Qwen25VLAdapter"]
