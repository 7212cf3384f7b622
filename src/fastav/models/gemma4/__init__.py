"""Gemma 4, with transformers' classes."""

from fastav.models.gemma4.adapter import Gemma4Adapter

__all__ = ["Gemma4Adapter"]
