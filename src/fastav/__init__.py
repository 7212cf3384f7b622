"""Training-free token pruning inside audio-visual LLMs.

    pipe = fastav.pipeline("videollama2", plan="fastav")
    answer = pipe("clip.mp4", "What is happening, and what do you hear?")

    with fastav.prune(model, "fastav"):      # a model you already have
        model.generate(**inputs, custom_generate=fastav.Decoding())

Importing this loads neither torch nor transformers; a name does when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastav.adapter import ModelAdapter, Prepared
    from fastav.budgets import Before, Frames, Share, Tokens, Unpadded
    from fastav.decoding.stopping import Stop
    from fastav.engine import Answer, Sampling
    from fastav.engines.transformers import Decoding, Pruning, prune
    from fastav.errors import FastAVError, FastAVWarning
    from fastav.inspection import Inspection
    from fastav.layout import Layout, Modality
    from fastav.media import Clip
    from fastav.method import Method, Signal, View
    from fastav.pipelines import Pipeline, pipeline
    from fastav.plan import Keep, Plan, Step
    from fastav.request import Request

__version__ = "0.2.0"

_HOMES = {
    "Answer": "engine",
    "Before": "budgets",
    "Clip": "media",
    "Decoding": "engines.transformers",
    "FastAVError": "errors",
    "FastAVWarning": "errors",
    "Frames": "budgets",
    "Inspection": "inspection",
    "Keep": "plan",
    "Layout": "layout",
    "Method": "method",
    "Modality": "layout",
    "ModelAdapter": "adapter",
    "Pipeline": "pipelines",
    "Plan": "plan",
    "Prepared": "adapter",
    "Pruning": "engines.transformers",
    "Request": "request",
    "Sampling": "engine",
    "Share": "budgets",
    "Signal": "method",
    "Step": "plan",
    "Stop": "decoding.stopping",
    "Tokens": "budgets",
    "Unpadded": "budgets",
    "View": "method",
    "pipeline": "pipelines",
    "prune": "engines.transformers",
}

__all__ = [
    "Answer",
    "Before",
    "Clip",
    "Decoding",
    "FastAVError",
    "FastAVWarning",
    "Frames",
    "Inspection",
    "Keep",
    "Layout",
    "Method",
    "Modality",
    "ModelAdapter",
    "Pipeline",
    "Plan",
    "Prepared",
    "Pruning",
    "Request",
    "Sampling",
    "Share",
    "Signal",
    "Step",
    "Stop",
    "Tokens",
    "Unpadded",
    "View",
    "pipeline",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastav' has no attribute {name!r}")
    from fastav.installation import importable

    with importable():
        return getattr(importlib.import_module(f"fastav.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
