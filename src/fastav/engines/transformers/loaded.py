"""Models that the caller has loaded, and models that are loaded with the caller's own keyword arguments."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from fastav.adapter import ModelAdapter, adapter_for
from fastav.engines.transformers.devices import is_dispatched, running_on
from fastav.engines.transformers.guards import check_model
from fastav.engines.transformers.wrapped import base_model, is_quantized
from fastav.errors import CheckpointError, FastAVError, reason_of
from fastav.models._checkpoint import read_processor


def usable(model: Any) -> tuple[PreTrainedModel, ModelAdapter]:
    """The model inside wrappers of PEFT and DDP, and its adapter, found by its architecture.

    Raises: UnsupportedModel; FastAVError for a model that would drop activations at random.
    """
    inner = base_model(model)
    check_model(inner)
    adapter = adapter_for({*(inner.config.architectures or ()), type(inner).__name__}, inner.config.to_dict())
    if any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in inner.modules()):
        raise FastAVError("the model is in training mode, in which dropout changes its answers", "call model.eval()")
    return inner, adapter


def processor_for(model: PreTrainedModel, adapter: ModelAdapter, processor: Any) -> ProcessorMixin:
    """The processor of a loaded model; if None, the one in the folder or the hub's cache that the model is from.

    Raises: CheckpointError for another model's processor, and if none is found.
    """
    kind: Any = getattr(adapter, "processor_class", None)  # a class, or the name of one of transformers'
    if processor is None:
        return _saved_processor(model, adapter, getattr(transformers, kind) if isinstance(kind, str) else kind)
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", None)
    if name is not None and name not in {base.__name__ for base in type(processor).__mro__}:
        raise CheckpointError(
            f"{adapter.name} needs a {name}, got {type(processor).__name__}",
            "pass processor=AutoProcessor.from_pretrained(...) of the model's own checkpoint",
        )
    return processor


def moved(model: Any, target: torch.device, *, is_required: bool) -> Any:
    """A model on a device.  What is dispatched or quantized stays where it was loaded.

    Raises: FastAVError for quantized weights on another device than the one that the caller requires.
    """
    if is_dispatched(model):
        return model
    if not is_quantized(model):
        return model.to(target)
    if is_required and set(running_on(model)) != {target}:
        raise FastAVError(
            f"the checkpoint is quantized, and its weights cannot be moved to {target}",
            f"load them there: model_kwargs={{'device_map': {str(target)!r}}}",
        )
    return model


@contextmanager
def as_load_error(source: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn what `from_pretrained` raises for the caller's keyword arguments into a CheckpointError."""
    try:
        yield
    except (TypeError, ValueError, ImportError) as error:
        names = ", ".join(name for name in options if name not in ("dtype", "attn_implementation"))
        if not names:
            raise
        raise CheckpointError(
            f"{source} cannot be loaded with {names}: {reason_of(error)}", "model_kwargs are those of from_pretrained"
        ) from error


def _saved_processor(model: PreTrainedModel, adapter: ModelAdapter, kind: Any) -> ProcessorMixin:
    source = str(getattr(model.config, "name_or_path", "") or "")
    reason = "the model does not say where it is from"
    if source and kind is not None:
        local = {} if Path(source).is_dir() else {"local_files_only": True}
        try:
            return read_processor(kind, source, local)
        except (OSError, FastAVError) as error:
            reason = reason_of(error)
    raise CheckpointError(
        f"no processor was passed, and none is found for this {adapter.name}: {reason}",
        "pass processor=AutoProcessor.from_pretrained(...)",
    )
