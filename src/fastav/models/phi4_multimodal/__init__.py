"""Phi-4-multimodal, with transformers' classes."""

from fastav.models.phi4_multimodal.adapter import Phi4MultimodalAdapter

__all__ = ["Phi4MultimodalAdapter"]
