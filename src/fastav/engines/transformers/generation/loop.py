"""fastav's decoding loop, in place of transformers' own.

`generate` prepares prompts, settings, logits processors and stopping criteria, and calls `Decoding`
(`custom_generate`).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from fastav import cache_argument
from fastav.adapter import ModelAdapter, adapter_for
from fastav.decoding.stopping import Stop
from fastav.engines.transformers.compiled_layers import is_compiled
from fastav.engines.transformers.generation import cuda_graphs
from fastav.engines.transformers.generation.buffers import LayerKV
from fastav.engines.transformers.generation.cuda_graphs import ROOM, DecodeStep, patched_attention
from fastav.engines.transformers.generation.sampler import HostStream, TokenSampler, TokenSource
from fastav.engines.transformers.wrapped import base_model, is_quantized
from fastav.errors import UnsupportedPlan
from fastav.pruning import decoder_layers

MAX_STEPS = 4  # captured steps to keep per model; each has its own buffers

_steps_lock = threading.Lock()
_steps: WeakKeyDictionary[PreTrainedModel, OrderedDict[Any, DecodeStep]] = WeakKeyDictionary()


class Decoding:
    """Greedy or sampled decoding for `model.generate(..., custom_generate=Decoding())`, with or without pruning.

    It returns the tokens of `generate` itself: the same processors and criteria choose them. It is faster because keys
    and values have preallocated buffers, because the host waits for the device only to learn, some steps late, whether
    all rows have ended, and because a CUDA device captures a step once and replays it. A captured step serves later
    prompts of about the same length, and is freed with the model.

    adapter: the model's adapter; None to find it by the architectures in the configuration. streamer: receives the
    prompt and every token. stop: texts that end an answer. Pass both here: transformers passes neither to a custom
    loop. keep_cache: whether the cache that you passed holds prompt and answer afterwards, but for the last token, so
    that a later turn can continue from it; that costs a copy.
    capture: whether steps have fixed shapes, which a CUDA device captures; None for yes where possible.
    max_captures: captured steps to keep for the model after a generation; each has its own buffers.

    Raises, when generating: UnsupportedModel; UnsupportedPlan for beams and anything else that is neither greedy nor
    sampled decoding of a prompt in one prefill.
    """

    exact_while_pruning = True

    def __init__(
        self,
        adapter: ModelAdapter | None = None,
        *,
        streamer: Any = None,
        stop: Stop | None = None,
        keep_cache: bool = False,
        capture: bool | None = None,
        max_captures: int = MAX_STEPS,
    ) -> None:
        self._adapter, self._streamer, self._stop = adapter, streamer, stop
        self._keep_cache, self._capture, self._max_captures = keep_cache, capture, max_captures

    @staticmethod
    def unsupported(config: GenerationConfig) -> str | None:
        """What in a generation config this loop does not support, where it would differ from `generate`; else None."""
        checks = {
            "beams and drafts": config.get_generation_mode()
            not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
            "a chunked prefill": config.prefill_chunk_size is not None,
            "generation without a cache": config.use_cache is False,
            "a cache of another kind": config.cache_implementation not in (None, "dynamic", "hybrid"),
            "attention maps and hidden states": config.output_attentions or config.output_hidden_states,
        }
        return next((what for what, is_requested in checks.items() if is_requested), None)

    @torch.inference_mode()
    def __call__(
        self,
        model: Any,
        input_ids: Int[Tensor, "batch prompt"],
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate tokens after a prompt; `generate` calls this."""
        _check(generation_config, kwargs)
        with torch.cuda.device(input_ids.device) if input_ids.device.type == "cuda" else nullcontext():
            sampler = self._start(input_ids, generation_config, logits_processor, stopping_criteria)
            inputs = model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=_n_unstored(input_ids, generation_config, kwargs),
                is_first_iteration=True,
                **kwargs,
            )
            with nullcontext() if "logits_to_keep" in kwargs else last_logits_only(model):
                output = model(**inputs, return_dict=True)
            token = sampler.take(output.logits[:, -1])
            kwargs |= cache_argument.as_argument(cache_argument.of_output(output), model.prepare_inputs_for_generation)
            del output, inputs
            cache = cache_argument.in_arguments(kwargs)
            length = cache.get_seq_length()
            decoded = None if sampler.done else self._decode(model, sampler, token, kwargs)
            answer = sampler.output()
            if decoded is not None:
                sequences = answer if isinstance(answer, Tensor) else answer.sequences
                decoded.return_to(cache, length + sequences.shape[1] - input_ids.shape[1] - 1)
            return answer

    def _start(
        self,
        input_ids: Int[Tensor, "batch prompt"],
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
    ) -> TokenSource:
        """What gives the tokens after this prompt."""
        stream = HostStream(input_ids, self._streamer, self._stop, do_sample=bool(config.do_sample))
        return TokenSampler(input_ids, config, processors, criteria, stream)

    def _decode(self, model: Any, sampler: TokenSource, token: Tensor, kwargs: dict[str, Any]) -> "_Decoded | None":
        """Decode until all rows have ended, and return a copy of the buffers if the cache is to be kept."""
        model = base_model(model)
        names = {*(model.config.architectures or ()), type(model).__name__}
        adapter = self._adapter or adapter_for(names, model.config.to_dict())
        decoder: Any = adapter.decoder(model)
        decoder_layers.check_types(decoder.config)
        inputs = _first_step(model, sampler.ids, kwargs)
        cache = cache_argument.in_arguments(kwargs)
        layers, prompt = _layer_kv(cache, decoder.config, kwargs.get("attention_mask"))
        emptied = list(cache.layers) if self._keep_cache else []
        cache.layers.clear()
        for layer in emptied:
            layer.keys = layer.values = None
        fixed = _capturable(model, adapter, inputs) if self._capture is None else self._capture
        previous = ExitStack()
        with patched_attention(decoder), getattr(model, "_optimize_model_for_decode", nullcontext)():
            cuda_graphs.check_masks(model, decoder, inputs, layers)
            while not sampler.done:
                room = min(sampler.n_left, ROOM)
                following = ExitStack()
                step = following.enter_context(
                    _decode_step(model, decoder, inputs, layers, room, fixed=fixed, max_captures=self._max_captures)
                )
                step.begin(inputs, layers, prompt)
                layers.clear()  # the buffers have copies of these keys and values
                previous.close()  # others may use the previous buffers, which are copied
                previous = following
                for _ in range(room):
                    if sampler.done:
                        break
                    token = sampler.take(step(token))
                inputs, layers, prompt = step.inputs, step.cache.stored(), step.cache.position.length
        decoded = _Decoded(emptied, [layer.copy() for layer in layers], prompt) if self._keep_cache else None
        previous.close()
        return decoded


class _Decoded(NamedTuple):
    """What buffers held after an answer.

    layers: of the cache, without keys and values. buffers: those of each layer that has its own. length: of the
    unpruned sequence.
    """

    layers: list[Any]
    buffers: list[LayerKV]
    length: int

    def return_to(self, cache: Any, length: int) -> None:
        """Fill the cache with the keys and values of the first `length` columns."""
        for layer, held in zip(self.layers, self.buffers, strict=False):  # later layers share those of earlier ones
            held.return_to(layer, self.length - length, length)
        cache.layers[:] = self.layers


def release_steps(model: Any) -> bool:
    """Free the captured steps of a model, and return whether there were any."""
    with _steps_lock:
        return bool(_steps.pop(model, None))


def _capturable(model: Any, adapter: ModelAdapter, inputs: Mapping[str, Any]) -> bool:
    """Whether a step can be captured, and replayed later with the same result.

    Quantized weights may wait for the device; adapters (LoRA) can be switched on and off without notice.
    """
    has_adapters = any(hasattr(module, "merged_adapters") for module in model.modules())  # PEFT's layers
    can_replay = not adapter.decode_syncs and inputs.get("position_ids") is not None
    return cuda_graphs.captures(model) and can_replay and not (is_quantized(model) or has_adapters)


@contextmanager
def last_logits_only(model: Any) -> Iterator[None]:
    """Make the output head of a model without `logits_to_keep` run on the last token alone, in this thread."""
    thread = threading.get_ident()

    def cut(_: Any, args: tuple[Any, ...]) -> Any:
        return (args[0][:, -1:], *args[1:]) if threading.get_ident() == thread else None

    hook = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _decode_step(
    model: Any,
    decoder: Any,
    inputs: dict[str, Any],
    layers: list[LayerKV],
    room: int,
    *,
    fixed: bool,
    max_captures: int,
) -> Iterator[DecodeStep]:
    """A step of these shapes, an earlier capture or new, for exclusive use."""
    capacities = tuple(layer.capacity(room, fixed=fixed) for layer in layers)
    if not fixed:
        yield DecodeStep(model, decoder, inputs, layers, capacities, fixed=False)
        return
    shapes = tuple((name, v.shape if isinstance(v, Tensor) else v) for name, v in sorted(inputs.items()))
    weights = tuple((part.data_ptr(), part.dtype) for part in (*model.parameters(), *model.buffers()))
    key = (capacities, shapes, weights, decoder.config._attn_implementation, model.training, is_compiled(decoder))
    with _steps_lock:
        step = _steps.setdefault(model, OrderedDict()).pop(key, None)
    step = step or DecodeStep(model, decoder, inputs, layers, capacities, fixed=True)
    yield step
    with _steps_lock:
        steps = _steps.setdefault(model, OrderedDict())
        steps[key] = step
        while len(steps) > max_captures:
            steps.popitem(last=False)


def _check(config: GenerationConfig, kwargs: Mapping[str, Any]) -> None:
    """Refuse settings with which this loop would differ from `generate`.  Raises: UnsupportedPlan."""
    what, cache = Decoding.unsupported(config), cache_argument.in_arguments(kwargs)
    if cache is not None and (type(cache) is not DynamicCache or bool(getattr(cache, "offloading", False))):
        what = "a cache of another kind"
    if what is not None:
        raise UnsupportedPlan(f"Decoding does not support {what}", "remove custom_generate")


def _n_unstored(ids: Tensor, config: GenerationConfig, kwargs: Mapping[str, Any]) -> int | None:
    """How many of a prompt's last tokens have to run, if the ids are of the whole sequence; None for all."""
    cache, mask = cache_argument.in_arguments(kwargs), kwargs.get("attention_mask")
    # `generate` drops a mask that hides nothing, and notes its length
    columns = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
    if cache is None or columns != ids.shape[1]:
        return None  # the ids are of new tokens alone
    return ids.shape[1] - cache.get_seq_length()


def _first_step(model: Any, ids: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the first forward after the prefill, as the model prepares them."""
    changed: dict[str, Any] = {}
    if (positions := kwargs.get("position_ids")) is not None:
        changed["position_ids"] = positions[..., -1:] + 1
    if (mask := kwargs.get("attention_mask")) is not None:
        changed["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **(dict(kwargs) | changed))
    replaced = ("attention_mask", *cache_argument.NAMES)
    return {name: value for name, value in inputs.items() if name not in replaced and _is_step_argument(value)}


def _is_step_argument(value: Any) -> bool:
    """Whether an argument is for one token or a setting of the forward; others are for the prompt."""
    return value.shape[-1:] == (1,) if isinstance(value, Tensor) else isinstance(value, bool | int | float | str | None)


def _layer_kv(cache: Any, config: Any, attention_mask: Int[Tensor, "batch prompt"] | None) -> tuple[list[LayerKV], int]:
    """Keys and values of every layer after the prefill, and the number of the prompt's columns."""
    prompt, mask = cache.get_seq_length(), None if attention_mask is None else attention_mask.bool()
    n_kv_layers, windows = decoder_layers.layers_with_cache(config), decoder_layers.windows(config)
    layers = zip(cache.layers[:n_kv_layers], windows[:n_kv_layers], strict=True)
    return [LayerKV.from_cache(layer, mask, prompt, window) for layer, window in layers], prompt
