"""Gemma 3n, by transformers' own classes."""

from fastav.models.gemma3n.adapter import Gemma3nAdapter

__all__ = ["Gemma3nAdapter"]
