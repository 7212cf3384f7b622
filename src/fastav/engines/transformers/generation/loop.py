"""Our decoding loop, in the place of transformers' own.

`generate` prepares prompts, settings, logits processors and stopping criteria, and hands over (`custom_generate`).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
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
from fastav.engines.transformers import stepping
from fastav.engines.transformers.buffers import Stored
from fastav.engines.transformers.choosing import Chosen, Echo
from fastav.engines.transformers.compiled import is_compiled
from fastav.engines.transformers.stepping import ROOM, Stepper, stepped
from fastav.engines.transformers.wrapped import base_model
from fastav.errors import UnsupportedPlan
from fastav.pruning import decoder_layers

CAPTURED = 4  # captured steps that are held for each model; each has its buffers

_captures = threading.Lock()
_captured: WeakKeyDictionary[PreTrainedModel, OrderedDict[Any, Stepper]] = WeakKeyDictionary()


class Decoding:
    """Greedy or sampled decoding for `model.generate(..., custom_generate=Decoding())`, pruned or not.

    Says what `generate` itself says, token for token: the same processors and criteria choose. Faster because every
    layer's keys and values have their place beforehand, nothing waits for the device but the look whether all rows have
    ended, some steps late, and on a CUDA device a step is captured once and replayed. What was captured for a model
    serves later prompts of about the same length, and goes with the model.

    adapter: of the model; by the names in its configuration if None. streamer: gets the prompt and every token. stop:
    texts that end an answer. Both are given here because transformers hands neither to a custom loop. capture: whether
    steps have fixed shapes, which a CUDA device captures; None for those there that do not wait for the device.

    Raises, when generating: UnsupportedModel, UnsupportedPlan for beams, continued caches and whatever else is neither
    greedy nor sampled decoding of a whole prompt.
    """

    exact_while_pruning = True

    def __init__(
        self,
        adapter: ModelAdapter | None = None,
        *,
        streamer: Any = None,
        stop: Stop | None = None,
        capture: bool | None = None,
    ) -> None:
        self._adapter, self._streamer, self._stop, self._capture = adapter, streamer, stop, capture

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
        """Called by `generate`."""
        _check(generation_config, kwargs)
        with torch.cuda.device(input_ids.device) if input_ids.device.type == "cuda" else nullcontext():
            echo = Echo(input_ids, self._streamer, self._stop, drawn=bool(generation_config.do_sample))
            chosen = Chosen(input_ids, generation_config, logits_processor, stopping_criteria, echo)
            inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
            with nullcontext() if "logits_to_keep" in kwargs else last_alone(model):
                output = model(**inputs, return_dict=True)
            token = chosen.take(output.logits[:, -1])
            kwargs |= cache_argument.as_argument(cache_argument.of_output(output), model.prepare_inputs_for_generation)
            del output, inputs
            if not chosen.done:
                self._decode(model, chosen, token, kwargs)
            return chosen.output()

    def _decode(self, model: Any, chosen: Chosen, token: Tensor, kwargs: dict[str, Any]) -> None:
        model = base_model(model)
        names = {*(model.config.architectures or ()), type(model).__name__}
        adapter = self._adapter or adapter_for(names, model.config.to_dict())
        decoder: Any = adapter.decoder(model)
        decoder_layers.check_types(decoder.config)
        inputs = _first_step(model, chosen.ids, kwargs)
        cache = cache_argument.in_arguments(kwargs)
        given, prompt = _given(cache, decoder.config, kwargs.get("attention_mask"))
        cache.layers.clear()
        fixed = _capturable(model, adapter, inputs) if self._capture is None else self._capture
        held = ExitStack()
        with stepped(decoder), getattr(model, "_optimize_model_for_decode", nullcontext)():
            stepping.check_masks(model, decoder, inputs, given)
            while not chosen.done:
                room = min(chosen.left, ROOM)
                following = ExitStack()
                stepper = following.enter_context(_stepper(model, decoder, inputs, given, room, fixed=fixed))
                stepper.begin(inputs, given, prompt)
                given.clear()  # what the prefill has stored may go: the buffers hold it
                held.close()  # others may have the buffers before, now that they are copied
                held = following
                for _ in range(room):
                    if chosen.done:
                        break
                    token = chosen.take(stepper(token))
                inputs, given, prompt = stepper.inputs, stepper.cache.stored(), stepper.cache.clock.length
        held.close()


def forget(model: Any) -> bool:
    """Give back the memory of what was captured for a model; whether there was any."""
    with _captures:
        return bool(_captured.pop(model, None))


def _capturable(model: Any, adapter: ModelAdapter, inputs: Mapping[str, Any]) -> bool:
    """Whether a step can be captured, and replayed later as what it was.

    Quantized weights may wait for the device; adapters (LoRA) are switched on and off without a trace.
    """
    quantized = getattr(model, "hf_quantizer", None) is not None or bool(getattr(model, "is_quantized", False))
    tuned = any(hasattr(module, "merged_adapters") for module in model.modules())  # as PEFT's layers have
    steady = not adapter.steps_wait and inputs.get("position_ids") is not None
    return stepping.captures(model) and steady and not (quantized or tuned)


@contextmanager
def last_alone(model: Any) -> Iterator[None]:
    """While active, a model that cannot be asked for it puts the last token alone through its head, in this thread."""
    here = threading.get_ident()

    def cut(_: Any, args: tuple[Any, ...]) -> Any:
        return (args[0][:, -1:], *args[1:]) if threading.get_ident() == here else None

    hook = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _stepper(
    model: Any, decoder: Any, inputs: dict[str, Any], given: list[Stored], room: int, *, fixed: bool
) -> Iterator[Stepper]:
    """One for these shapes: captured before, or new.  Nobody else has it meanwhile."""
    capacities = tuple(one.capacity(room, fixed=fixed) for one in given)
    if not fixed:
        yield Stepper(model, decoder, inputs, given, capacities, fixed=False)
        return
    shapes = tuple((name, v.shape if isinstance(v, Tensor) else v) for name, v in sorted(inputs.items()))
    weights = tuple((part.data_ptr(), part.dtype) for part in (*model.parameters(), *model.buffers()))
    key = (capacities, shapes, weights, decoder.config._attn_implementation, model.training, is_compiled(decoder))
    with _captures:
        stepper = _captured.setdefault(model, OrderedDict()).pop(key, None)
    stepper = stepper or Stepper(model, decoder, inputs, given, capacities, fixed=True)
    yield stepper
    with _captures:
        held = _captured.setdefault(model, OrderedDict())
        held[key] = stepper
        while len(held) > CAPTURED:
            held.popitem(last=False)


def _check(config: GenerationConfig, kwargs: Mapping[str, Any]) -> None:
    """Raises: UnsupportedPlan for whatever this loop would do otherwise than `generate`."""
    cache = cache_argument.in_arguments(kwargs)
    refused = {
        "beams and drafts": config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "a chunked prefill": config.prefill_chunk_size is not None,
        "generation without a cache": not config.use_cache,
        "a cache that holds something already": cache is not None and cache.get_seq_length() > 0,
        "a cache of another kind": cache is not None
        and (type(cache) is not DynamicCache or bool(getattr(cache, "offloading", False))),
        "attention maps and hidden states": config.output_attentions or config.output_hidden_states,
    }
    for what, asked in refused.items():
        if asked:
            raise UnsupportedPlan(f"Decoding does not do {what}", "leave custom_generate out")


def _first_step(model: Any, ids: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the first forward behind the prefill, as the model prepares them."""
    changed: dict[str, Any] = {}
    if (positions := kwargs.get("position_ids")) is not None:
        changed["position_ids"] = positions[..., -1:] + 1
    if (shown := kwargs.get("attention_mask")) is not None:
        changed["attention_mask"] = torch.cat([shown, shown.new_ones(shown.shape[0], 1)], dim=1)
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **(dict(kwargs) | changed))
    own = ("attention_mask", *cache_argument.NAMES)
    return {name: value for name, value in inputs.items() if name not in own and _of_a_step(value)}


def _of_a_step(value: Any) -> bool:
    """Whether an argument says something of one token, or of how to run; others are the prompt's, and were heard."""
    return value.shape[-1:] == (1,) if isinstance(value, Tensor) else isinstance(value, bool | int | float | str | None)


def _given(cache: Any, config: Any, shown: Int[Tensor, "batch prompt"] | None) -> tuple[list[Stored], int]:
    """What the prefill has stored, layer by layer, and how many columns it had."""
    prompt, mask = cache.get_seq_length(), None if shown is None else shown.bool()
    owners, windows = decoder_layers.layers_with_cache(config), decoder_layers.windows(config)
    layers = zip(cache.layers[:owners], windows[:owners], strict=True)
    return [Stored.of(layer, mask, prompt, window) for layer, window in layers], prompt
