"""Encoders that run ahead: in a thread, while the model answers another batch."""

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from fastav.adapter import ModelAdapter
from fastav.engine import GREEDY
from fastav.engines.transformers.choosing import settings
from fastav.engines.transformers.decoding import Decoding
from fastav.engines.transformers.devices import input_device, is_dispatched
from fastav.engines.transformers.guards import patched
from fastav.engines.transformers.stopwatch import Stopwatch


class _Entered(Exception):
    """The decoder is about to run."""


def on_device(inputs: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of a model where it is; features in the type of its weights."""

    device = input_device(model)

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        features = value.is_floating_point() and value.ndim > 1  # one number an item is a time, which must stay exact
        return value.to(device=device, dtype=model.dtype if features else value.dtype)

    return {name: placed(value) for name, value in inputs.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A batch whose encoders have run.

    inputs: arguments of the model, on its device. seconds: that the encoders took; on a GPU this waits for them.
    """

    inputs: Mapping[str, Any]
    seconds: Callable[[], float]
    outputs: Sequence[deque[Any]]  # of each encoder, call by call
    done: Any  # a CUDA event, None on a CPU

    @contextmanager
    def given(self, encoders: Sequence[nn.Module]) -> Iterator[None]:
        """While active, the encoders say in this thread what they have said before, and in others what they will.

        For once, and in inference mode.
        """
        if self.done is not None:
            self._await()
        with ExitStack() as stack:
            for encoder, outputs in zip(encoders, self.outputs, strict=True):
                stack.enter_context(patched(encoder, "forward", _repeating(encoder.forward, outputs)))
            yield
        assert not any(self.outputs), "an encoder was called less often than ahead"

    def _await(self) -> None:
        """Let what this thread launches wait for the encoders, and their memory wait for it."""
        tensors = [leaf for leaf in tree_leaves([self.inputs, *map(list, self.outputs)]) if isinstance(leaf, Tensor)]
        with torch.cuda.device(next(tensor.device for tensor in tensors if tensor.is_cuda)):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(stream)


def _repeating(plain: Callable[..., Any], outputs: deque[Any]) -> Callable[..., Any]:
    here = threading.get_ident()

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return outputs.popleft() if outputs and threading.get_ident() == here else plain(*args, **kwargs)

    return forward


class Ahead:
    """A model's encoders, to be run in any thread while the model itself answers; by one thread at a time.

    They belong to a twin: the model once more, of the same weights. So they meet neither the hooks of pruning nor what
    a forward leaves on a model for its later ones (M-RoPE's offsets). The twin runs `generate` up to its first decoder
    layer, and so calls its encoders as the model will. On a CUDA device it has a stream of its own.
    """

    def __init__(self, model: PreTrainedModel, adapter: ModelAdapter) -> None:
        shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        self._model: Any = copy.deepcopy(model, shared)
        self._decoding = Decoding(adapter)
        self._watch = Stopwatch(model.device)
        self._calls: list[deque[Any]] = []
        self._stream: Any = None
        for number, encoder in enumerate(adapter.encoders(self._model)):
            self._calls.append(deque())
            encoder.register_forward_hook(self._recorder(number))
        layers: Any = adapter.decoder(self._model).layers
        layers[0].register_forward_pre_hook(_enter)
        if model.device.type == "cuda":
            self._stream = torch.cuda.Stream(model.device)
            torch.cuda.synchronize(model.device)  # the weights are there

    @staticmethod
    def possible(model: PreTrainedModel, adapter: ModelAdapter) -> bool:
        """Whether a twin is sure to be one, and to be alone.

        A method that was replaced on a module belongs to the original, whoever calls it. Where weights are quantized,
        offloaded or spread over devices there is more than weights to share. Models that also speak answer through
        another one.
        """
        modules = [(type(module), vars(module)) for module in model.modules()]
        patched = any(callable(own) and hasattr(kind, name) for kind, owned in modules for name, own in owned.items())
        spread = is_dispatched(model) or len({part.device for part in chain(model.parameters(), model.buffers())}) > 1
        quantized = bool(getattr(model, "is_quantized", False))
        return not (patched or spread or quantized) and adapter.language_model(model) is model

    @torch.inference_mode()
    def encode(self, inputs: Mapping[str, Any]) -> Encoded:
        """Run the encoders on the arguments of the model's forward."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            placed = on_device(inputs, self._model)
            start = self._watch.now()
            try:
                with suppress(_Entered):
                    self._model.generate(**placed, **settings(GREEDY), max_new_tokens=1, custom_generate=self._decoding)
                outputs = [deque(calls) for calls in self._calls]
            finally:
                for calls in self._calls:
                    calls.clear()
            end = self._watch.now()
            done = None if self._stream is None else self._stream.record_event()
        return Encoded(inputs=placed, seconds=lambda: self._watch.between(start, end), outputs=outputs, done=done)

    def _recorder(self, number: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            # the model goes on with this, and may change it in place
            self._calls[number].append(tree_map_only(Tensor, torch.clone, output))

        return record


def _enter(*_: Any) -> None:
    raise _Entered
