"""Gemma 3n, with transformers' classes."""

from fastav.models.gemma3n.adapter import Gemma3nAdapter

__all__ = ["Gemma3nAdapter"]
