"""The engine on Hugging Face transformers."""

from fastav.engines.transformers.pruner import Pruning, prune

__all__ = ["Pruning", "prune"]
