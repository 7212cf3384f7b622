"""One decoding step of a model over buffers: run as it is, or, on a CUDA device, captured once and replayed."""

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

ROOM = 256  # tokens that buffers have room for, behind what a prefill has stored
CAPTURING = frozenset({"cuda"})  # kinds of devices that capture

# settings of an attention call, beside its mask, that leave it plain attention
_PLAIN = {
    *("scaling", "dropout", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache"),
    *("output_attentions", "output_router_logits"),
}
MASKED = ("eager", "sdpa")  # attention whose mask holds windows; other kernels take their length
_running = threading.local()
_checked: WeakKeyDictionary[Any, set[tuple[Any, ...]]] = WeakKeyDictionary()
_capturing = threading.Lock()


class DecodeStep:
    """Steps of one shape: a batch, and the capacity of every layer's buffers.

    inputs: arguments of the model's forward for the next step, as the model itself prepares them, without mask and
    cache. fixed: keep shapes as they are, with masks over whole buffers; on a CUDA device the step is then captured.
    No reference to the model is kept, so that a model which is deleted frees its steps.
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
        self._own = cache_argument.as_argument(self.cache, model.forward)
        self._own["attention_mask"] = _no_mask(decoder.config, like[0].keys.device)
        self._graph: Any = None
        self._logits: Tensor | None = None
        if fixed and captures(model):
            self._graph, self._logits = record(self._step, model.device)

    def begin(self, inputs: Mapping[str, Any], layers: Sequence[LayerKV], prompt: int) -> None:
        """Start after a prefill.  inputs: of its first step, for positions."""
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self.inputs[name].copy_(value)
        self.cache.fill(layers, prompt)

    def __call__(self, token: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocabulary"]:
        """The logits behind one more token, valid until the next call."""
        self.inputs["input_ids"].copy_(token[:, None])
        if self._graph is None:
            self._logits = self._step()
        else:
            self._graph.replay()
        self.cache.position.tick()
        assert self._logits is not None
        return self._logits

    def masks(self) -> dict[nn.Module, Any]:
        """The mask or window that the model's own code gives each attention call of a step: as `_agrees` takes it."""
        if self._kind in MASKED:
            self._own["attention_mask"] = None
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
            logits = model(**self.inputs, **self._own).logits[:, -1]
        finally:
            _running.layers = {}
        self.cache.end_step()
        self.cache.position.advance()
        if (positions := self.inputs.get("position_ids")) is not None:
            positions.add_(1)
        return logits


def check_masks(model: Any, decoder: Any, inputs: Mapping[str, Any], like: Sequence[LayerKV]) -> None:
    """Refuse a model whose layers see other tokens than its configuration says.

    Once for each model: it runs a step at a position far behind the prompt, where all windows slide, and makes the
    masks itself.  inputs: of a step. like: keys and values after a prefill.

    Raises: UnsupportedModel.
    """
    kind, windows = decoder.config._attn_implementation, tuple(one.window for one in like)
    if (kind, windows) in _checked.setdefault(decoder, set()):
        return
    few = [one.first(1) for one in like]
    step = DecodeStep(model, decoder, inputs, few, [2] * len(few), fixed=False)
    longest = getattr(decoder.config, "max_position_embeddings", None) or 0
    far = max(longest, *(2 * (window or 0) for window in windows), 1024)
    step.cache.fill(few, far)
    masks = step.masks()
    for index, (layer, source) in enumerate(zip(decoder.layers, step.sources, strict=True)):
        attention = attention_of(layer)
        if attention not in masks or not _agrees(masks[attention], windows[source], far + 1, kind):
            scope = "all earlier tokens" if windows[source] is None else f"a window of {windows[source]} tokens"
            raise UnsupportedModel(
                f"by its configuration layer {index} of {type(decoder).__name__} sees {scope}, and the model's own "
                "masks differ",
                "leave custom_generate out",
            )
    _checked[decoder].add((kind, windows))


def _agrees(setting: Any, window: int | None, total: int, kind: str) -> bool:
    """Whether an attention call lets the last of `total` tokens see exactly a window (None: all).

    setting: its mask, or for attention that is not in `MASKED` its `sliding_window`.
    """
    if kind not in MASKED or setting is None:
        return setting == window
    visible = setting if setting.dtype == torch.bool else setting > torch.finfo(setting.dtype).min / 2
    columns = torch.arange(total, device=visible.device)
    expected = columns > total - 1 - (total if window is None else window)
    return visible.shape[-1] == total and torch.equal(visible, expected.expand_as(visible))


def captures(model: PreTrainedModel) -> bool:
    """Whether steps of this model can be captured: all weights on one CUDA device, and none offloaded."""
    return model.device.type in CAPTURING and not is_dispatched(model) and len(running_on(model)) == 1


def record(step: Callable[[], Tensor], device: torch.device) -> tuple[Any, Tensor]:
    """Capture a step: a graph to `replay`, and the tensor that holds its result.

    What it writes meanwhile is written over by `Stepper.begin`. A process captures one thing at a time.
    """
    with _capturing, torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries set themselves up outside the record
            for _ in range(2):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = step()
    return graph, result


@contextmanager
def patched_attention(decoder: Any) -> Iterator[None]:
    """While active, the attention of a step reads buffers, by `attend`; other calls of the decoder are unchanged."""
    with ExitStack() as stack:
        for layer in decoder.layers:
            stack.enter_context(override_attention(attention_of(layer), attend))
        yield


def attend(
    function: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """Attention of a step's query over its layer's buffers; other calls go to `function`."""
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
    """Raises: UnsupportedPlan for kernels that take no such mask."""
    if visible is not None and "flash" in kind:
        raise UnsupportedPlan(
            "this model's attention has settings that only its flash kernel knows, which takes no mask for one query",
            "leave custom_generate out, or load the model with attn_implementation='sdpa'",
        )
    if visible is None or kind != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def _no_mask(config: PreTrainedConfig, device: torch.device) -> Any:
    """A mask to pass to the decoder so that it makes none: `attend` does not read it."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    types = getattr(config, "layer_types", None)
    return mask if types is None else dict.fromkeys(types, mask)
