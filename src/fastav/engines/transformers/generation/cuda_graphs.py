"""One decoding step of a model over buffers: run directly, or, on a CUDA device, captured once and replayed."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastav import cache_argument
from fastav.engines.transformers.attention_hooks import override_attention
from fastav.engines.transformers.devices import is_dispatched, running_on
from fastav.engines.transformers.generation.buffers import LayerKV, StepCache, StepLayer
from fastav.engines.transformers.wrapped import attention_of
from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.pruning import decoder_layers
from fastav.pruning.attention import one_query_attention

ROOM = 256  # tokens that buffers have room for, after those of the prefill
CAPTURING = frozenset({"cuda"})  # types of devices that can capture

# arguments of an attention call, besides its mask, that plain attention supports
_PLAIN = {
    *("scaling", "dropout", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache"),
    *("output_attentions", "output_router_logits"),
}
MASKED = ("eager", "sdpa")  # attention whose mask includes windows; other kernels take a window's length
_running = threading.local()
_checked: WeakKeyDictionary[Any, set[tuple[Any, ...]]] = WeakKeyDictionary()
_capturing = threading.Lock()


class DecodeStep:
    """Decoding steps of one shape: a batch size, and the capacity of every layer's buffers.

    inputs: arguments of the model's forward for the next step, as the model itself prepares them, without mask and
    cache. fixed: keep all shapes, with masks over entire buffers; on a CUDA device the step is then captured.
    A step has no strong reference to its model, so that deleting the model frees its steps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: Any,
        inputs: Mapping[str, Any],
        like: Sequence[LayerKV],
        capacities: Sequence[int],
        *,
        fixed: bool,
    ) -> None:
        self.cache = StepCache(like, capacities, fixed=fixed)
        self._model, self._decoder = ref(model), ref(decoder)
        self.sources = [decoder_layers.source(decoder.config, index) for index in range(len(decoder.layers))]
        self.inputs = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        self._kind = decoder.config._attn_implementation
        self._arguments = cache_argument.as_argument(self.cache, model.forward)
        self._arguments["attention_mask"] = _no_mask(decoder.config, like[0].keys.device)
        self._graph: Any = None
        self._logits: Tensor | None = None
        if fixed and captures(model):
            self._graph, self._logits = record(self._step, model.device)

    def begin(self, inputs: Mapping[str, Any], layers: Sequence[LayerKV], prompt: int) -> None:
        """Start after a prefill.  inputs: arguments of the first step, for positions."""
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self.inputs[name].copy_(value)
        self.cache.fill(layers, prompt)

    def __call__(self, token: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocabulary"]:
        """The logits after one more token, valid until the next call."""
        self.inputs["input_ids"].copy_(token[:, None])
        if self._graph is None:
            self._logits = self._step()
        else:
            self._graph.replay()
        self.cache.position.tick()
        assert self._logits is not None
        return self._logits

    def masks(self) -> dict[nn.Module, Any]:
        """The mask or window that the model's own code passes to each attention call of a step, for `_agrees`."""
        if self._kind in MASKED:
            self._arguments["attention_mask"] = None
        _running.masks = masks = {}
        try:
            self._step()
        finally:
            _running.masks = None
        return masks

    def _step(self) -> Float[Tensor, "batch vocabulary"]:
        model, decoder = self._model(), self._decoder()
        assert model is not None
        assert decoder is not None
        layers: Any = decoder.layers
        _running.layers = {
            attention_of(layer): self.cache.steps[source] for layer, source in zip(layers, self.sources, strict=True)
        }
        try:
            logits = model(**self.inputs, **self._arguments).logits[:, -1]
        finally:
            _running.layers = {}
        self.cache.end_step()
        self.cache.position.advance()
        if (positions := self.inputs.get("position_ids")) is not None:
            positions.add_(1)
        return logits


def check_masks(model: Any, decoder: Any, inputs: Mapping[str, Any], like: Sequence[LayerKV]) -> None:
    """Refuse a model whose layers attend to other tokens than its configuration says.

    The check runs once per model: it runs a step at a position far after the prompt, where all windows slide, with
    masks by the model's own code.  inputs: arguments of a step. like: keys and values after a prefill.

    Raises: UnsupportedModel.
    """
    kind, windows = decoder.config._attn_implementation, tuple(layer.window for layer in like)
    if (kind, windows) in _checked.setdefault(decoder, set()):
        return
    first_tokens = [layer.first(1) for layer in like]
    step = DecodeStep(model, decoder, inputs, first_tokens, [2] * len(first_tokens), fixed=False)
    max_length = getattr(decoder.config, "max_position_embeddings", None) or 0
    position = max(max_length, *(2 * (window or 0) for window in windows), 1024)
    step.cache.fill(first_tokens, position)
    masks = step.masks()
    for index, (layer, source) in enumerate(zip(decoder.layers, step.sources, strict=True)):
        attention = attention_of(layer)
        if attention not in masks or not _agrees(masks[attention], windows[source], position + 1, kind):
            scope = "all earlier tokens" if windows[source] is None else f"a window of {windows[source]} tokens"
            raise UnsupportedModel(
                f"by its configuration layer {index} of {type(decoder).__name__} attends to {scope}, and the model's "
                "own masks differ",
                "remove custom_generate",
            )
    _checked[decoder].add((kind, windows))


def _agrees(mask: Any, window: int | None, total: int, kind: str) -> bool:
    """Whether an attention call lets the last of `total` tokens see exactly a window (None: all).

    mask: the mask of the call; for attention that is not in `MASKED`, its `sliding_window`.
    """
    if kind not in MASKED or mask is None:
        return mask == window
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    columns = torch.arange(total, device=visible.device)
    expected = columns > total - 1 - (total if window is None else window)
    return visible.shape[-1] == total and torch.equal(visible, expected.expand_as(visible))


def captures(model: PreTrainedModel) -> bool:
    """Whether steps of this model can be captured: all weights on one CUDA device, and none offloaded."""
    return model.device.type in CAPTURING and not is_dispatched(model) and len(running_on(model)) == 1


def record(step: Callable[[], Tensor], device: torch.device) -> tuple[Any, Tensor]:
    """Capture a step as a graph to `replay`, and the tensor with its result.

    `DecodeStep.begin` overwrites what the capture writes. A process makes one capture at a time.
    """
    with _capturing, torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries initialise themselves outside the capture
            for _ in range(2):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = step()
    return graph, result


@contextmanager
def patched_attention(decoder: Any) -> Iterator[None]:
    """Make the attention of steps read buffers, by `attend`, while the context lasts; other calls are unchanged."""
    with ExitStack() as stack:
        for layer in decoder.layers:
            stack.enter_context(override_attention(attention_of(layer), attend))
        yield


def attend(
    function: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """Attention of a step's query over its layer's buffers; for other calls, `function`."""
    layer: StepLayer | None = getattr(_running, "layers", {}).get(module)
    if layer is None:
        return function(module, query, key, value, mask, *args, **kwargs)
    layer.require_updated()
    visible, kind = layer.visible(query.device), module.config._attn_implementation
    if (masks := getattr(_running, "masks", None)) is not None:
        masks[module] = mask if kind in MASKED else kwargs.get("sliding_window")
    names = {name for name, setting in kwargs.items() if setting is not None}
    if kind == "eager" or args or names - _PLAIN or kwargs.get("dropout"):
        return function(module, query, key, value, _as_kind(visible, kind, query.dtype), *args, **kwargs)
    return one_query_attention(query, key, value, visible, kwargs.get("scaling")).transpose(1, 2), None


def _as_kind(visible: Bool[Tensor, "batch 1 1 stored"] | None, kind: str, dtype: torch.dtype) -> Tensor | None:
    """The mask in the form that a kernel takes.  Raises: UnsupportedPlan for kernels that take no such mask."""
    if visible is not None and "flash" in kind:
        raise UnsupportedPlan(
            "this model's attention has settings that only its flash kernel supports, which takes no mask here",
            "remove custom_generate, or load the model with attn_implementation='sdpa'",
        )
    if visible is None or kind != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def _no_mask(config: PreTrainedConfig, device: torch.device) -> Any:
    """A placeholder mask, so that the decoder makes none; `attend` does not read it."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    types = getattr(config, "layer_types", None)
    return mask if types is None else dict.fromkeys(types, mask)
