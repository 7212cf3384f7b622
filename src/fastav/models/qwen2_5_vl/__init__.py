"""Qwen2.5-VL, by transformers' own classes."""

from fastav.models.qwen2_5_vl.adapter import Qwen25VLAdapter

__all__ = ["Qwen25VLAdapter"]
