"""Prefetching: the encoders of the next batch run in a thread while the model answers another batch."""

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
from fastav.decoding.settings import greedy_settings
from fastav.engines.transformers.devices import input_device, is_dispatched
from fastav.engines.transformers.generation.loop import Decoding
from fastav.engines.transformers.guards import patched
from fastav.engines.transformers.timing import Stopwatch
from fastav.engines.transformers.wrapped import is_quantized


class _StopBeforeDecoder(Exception):
    """Ends a forward before the decoder's first layer, when the encoders have run."""


def on_device(inputs: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Move arguments of a model to its device, and features to the dtype of its weights."""
    device = input_device(model)

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        is_features = value.is_floating_point() and value.ndim > 1  # one number per item is a time, and must stay exact
        return value.to(device=device, dtype=model.dtype if is_features else value.dtype)

    return {name: move(value) for name, value in inputs.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """A batch whose encoders have run.

    inputs: arguments of the model, on its device. seconds: returns the encoders' time; on a GPU it waits for them.
    outputs: of each encoder, call by call. done: the CUDA event after the encoders; None on a CPU.
    """

    inputs: Mapping[str, Any]
    seconds: Callable[[], float]
    outputs: Sequence[deque[Any]]
    done: Any

    @contextmanager
    def replay(self, encoders: Sequence[nn.Module]) -> Iterator[None]:
        """Make the encoders return these outputs in this thread, while the context lasts; in other threads they run.

        Works once, in inference mode.
        """
        if self.done is not None:
            self._wait()
        with ExitStack() as stack:
            for encoder, outputs in zip(encoders, self.outputs, strict=True):
                stack.enter_context(patched(encoder, "forward", _replaying(encoder.forward, outputs)))
            yield
        assert not any(self.outputs), "an encoder was called less often than during prefetching"

    def _wait(self) -> None:
        """Make kernels of this thread wait for the encoders, and keep the encoders' memory until they have run."""
        tensors = [leaf for leaf in tree_leaves([self.inputs, *map(list, self.outputs)]) if isinstance(leaf, Tensor)]
        with torch.cuda.device(next(tensor.device for tensor in tensors if tensor.is_cuda)):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(stream)


def _replaying(original: Callable[..., Any], outputs: deque[Any]) -> Callable[..., Any]:
    thread = threading.get_ident()

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return outputs.popleft() if outputs and threading.get_ident() == thread else original(*args, **kwargs)

    return forward


class EncoderPrefetcher:
    """Runs a model's encoders in any thread, one at a time, while the model itself answers.

    The encoders are those of a copy of the model that shares its weights, so that they meet neither the hooks of
    pruning nor the state that a forward leaves on the model (M-RoPE's offsets). The copy runs `generate` up to its
    first decoder layer, and so calls its encoders as the model does. On a CUDA device it has its own stream.
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
        layers[0].register_forward_pre_hook(_stop_before_decoder)
        if model.device.type == "cuda":
            self._stream = torch.cuda.Stream(model.device)
            torch.cuda.synchronize(model.device)  # until the weights are loaded

    @staticmethod
    def is_supported(model: PreTrainedModel, adapter: ModelAdapter) -> bool:
        """Whether a copy of the model behaves as the model does, and does not affect it.

        Not supported are models with a method replaced on a module (the copy would call the original's), with weights
        that are quantized, offloaded or spread over devices, and models that also speak.
        """
        modules = [(type(module), vars(module)) for module in model.modules()]
        is_patched = any(
            callable(value) and hasattr(kind, name) for kind, own in modules for name, value in own.items()
        )
        devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
        is_spread = is_dispatched(model) or len(devices) > 1
        return not (is_patched or is_spread or is_quantized(model)) and adapter.language_model(model) is model

    @torch.inference_mode()
    def encode(self, inputs: Mapping[str, Any]) -> EncodedBatch:
        """Run the encoders on the arguments of the model's forward."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            moved = on_device(inputs, self._model)
            start = self._watch.now()
            try:
                with suppress(_StopBeforeDecoder):
                    self._model.generate(
                        **moved,
                        **greedy_settings(),
                        stop_strings=None,
                        max_new_tokens=1,
                        custom_generate=self._decoding,
                    )
                outputs = [deque(calls) for calls in self._calls]
            finally:
                for calls in self._calls:
                    calls.clear()
            end = self._watch.now()
            done = None if self._stream is None else self._stream.record_event()
        return EncodedBatch(inputs=moved, seconds=lambda: self._watch.between(start, end), outputs=outputs, done=done)

    def _recorder(self, number: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            # the model continues with this output, and may change it in place
            self._calls[number].append(tree_map_only(Tensor, torch.clone, output))

        return record


def _stop_before_decoder(*_: Any) -> None:
    raise _StopBeforeDecoder
