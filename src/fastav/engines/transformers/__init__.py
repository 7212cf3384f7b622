"""The engine on Hugging Face transformers."""

from fastav.engines.transformers.decoding import Decoding
from fastav.engines.transformers.engine import TransformersEngine
from fastav.engines.transformers.pruner import Pruning, prune

__all__ = ["Decoding", "Pruning", "TransformersEngine", "prune"]
