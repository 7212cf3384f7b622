"""The engine on Hugging Face transformers."""

from fastav.compatibility import require_tested

require_tested("torch", "transformers")  # before modules that a release outside the range may not have

from fastav.engines.transformers.engine import TransformersEngine  # noqa: E402
from fastav.engines.transformers.generation.loop import Decoding  # noqa: E402
from fastav.engines.transformers.hooks import Pruning, prune  # noqa: E402

__all__ = ["Decoding", "Pruning", "TransformersEngine", "prune"]
