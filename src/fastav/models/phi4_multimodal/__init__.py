"""Phi-4-multimodal, by transformers' own classes."""

from fastav.models.phi4_multimodal.adapter import Phi4MultimodalAdapter

__all__ = ["Phi4MultimodalAdapter"]
