"""Checks that refuse whatever pruning cannot do exactly, before it runs."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, HQQQuantizedLayer, QuantizedCache

from fastav import token_mixing
from fastav.adapter import ModelAdapter
from fastav.engines.transformers.generation.buffers import StepCache
from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.layout import Layout
from fastav.method import Signal
from fastav.pruning.compiled import CompiledPlan
from fastav.pruning.decoder_layers import layers_with_cache, narrow
from fastav.transfer import upload

_DRAFTS = "puts draft tokens into the prefill, which shifts the last query"
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {  # settings of generate: test of its value, and the reason
    "assistant_model": (bool, f"assisted decoding {_DRAFTS}"),
    "prompt_lookup_num_tokens": (bool, f"prompt lookup {_DRAFTS}"),
    "assistant_early_exit": (bool, f"early-exit drafting {_DRAFTS}"),
    "use_mtp": (bool, f"multi-token prediction {_DRAFTS}"),
    "prefill_chunk_size": (bool, "a chunked prefill would score every chunk by that chunk's own last query"),
    "custom_generate": (
        lambda value: bool(value) and not getattr(value, "exact_while_pruning", False),
        "custom generation code may not keep the cache (fastav.Decoding does)",
    ),
    "guidance_scale": (
        lambda value: value not in (None, 1),
        "guidance runs the model on a second prompt, which would be pruned by its own last query",
    ),
    "use_cache": (lambda value: value is False, "without a cache every token would prune again, by another last query"),
    "cache_implementation": (
        lambda value: value not in (None, "dynamic", "hybrid", "offloaded", "quantized"),
        "this cache cannot hold layers of different lengths",
    ),
}
_PACKING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
# relative difference between copies of a prompt, whose media are encoded in a batch
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE = 5e-2  # in other dtypes


def check_layers(layers: Sequence[nn.Module]) -> None:
    """Refuse layers with modules that mix tokens by more than attention, whatever the configuration says.

    Raises: UnsupportedModel.
    """
    for layer in layers:
        if reason := token_mixing.of_layer(layer):
            raise UnsupportedModel(f"{type(layer).__name__} cannot be pruned: {reason}")


def check_attention(config: PreTrainedConfig, implementation: str | None, first: int) -> None:
    """Refuse attention implementations whose masks pruning cannot adapt.  first: the first pruned layer.

    Raises: UnsupportedPlan.
    """
    flash = implementation is not None and "flash" in implementation
    if flash and layers_with_cache(config) < config.num_hidden_layers:
        raise UnsupportedPlan(
            "flash attention assumes that a layer's queries are its last keys, which is not so where layers share keys",
            "load the model with attn_implementation='sdpa'",
        )
    if flash and any(narrow(config)[first:]):
        raise UnsupportedPlan(
            "flash attention counts its sliding window in stored keys, which are not adjacent after pruning",
            "load the model with attn_implementation='sdpa', or prune after the last sliding-window layer",
        )
    if not (implementation in ("eager", "sdpa") or flash):
        raise UnsupportedPlan(
            f"attention {implementation!r} is not supported while pruning",
            "load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'",
        )


def check_cache(cache: Cache | None, compiled: CompiledPlan) -> None:
    """Refuse caches whose layers must all have the same length, or that pack values of several tokens together.

    Raises: UnsupportedPlan.
    """
    if cache is None or isinstance(cache, StepCache) or type(cache) is DynamicCache:
        return
    if type(cache) is not QuantizedCache:
        raise UnsupportedPlan(f"{type(cache).__name__} cannot hold layers of different lengths", "use a DynamicCache")
    layers: list[Any] = cache.layers[compiled.first_layer :]
    if any(isinstance(layer, HQQQuantizedLayer) for layer in layers):
        raise UnsupportedPlan(
            "HQQ stops to improve its scales when the error over all tokens does, dropped ones included, so that "
            "pruning changes how kept tokens are quantized",
            'use QuantizedCache(backend="quanto")',
        )
    if any(layer.axis_key != 0 or layer.axis_value != 0 for layer in layers):
        raise UnsupportedPlan(
            "a quantized cache with axis -1 scales a channel of several tokens together, dropped ones with kept ones",
            "use axis_key=0 and axis_value=0",
        )
    if compiled.cache_cuts or compiled.earlier_caches_until:
        raise UnsupportedPlan(
            "a quantized cache has packed a layer's tokens before a step with cache_only or earlier_caches drops some, "
            "and unpacking and packing the others again would round them twice",
            "remove cache_only and earlier_caches, or use a DynamicCache",
        )


def check_model(model: Any) -> None:
    """Refuse a wrapper around a model: the hooks must be on the model itself.  Raises: UnsupportedModel."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a transformers model",
            "pass the inner model: the module that you gave to torch.compile, FSDP or DataParallel",
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModel("a model compiled as a whole cannot be pruned", "compile its decoder layers instead")


def check_call(inputs: Mapping[str, Any], config: PreTrainedConfig, decoder: nn.Module) -> None:
    """Refuse calls that need the tokens which pruning drops.  Raises: UnsupportedPlan."""
    tensors = (*inputs.values(), *decoder.parameters()) if torch.is_grad_enabled() else ()
    if any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        raise UnsupportedPlan("pruning drops gradients with the tokens", "run under torch.inference_mode()")
    if inputs.get("labels") is not None:
        raise UnsupportedPlan(
            "labels need logits at every token, and pruning drops some", "compute the loss from the logits of text"
        )
    for name in ("output_hidden_states", "output_attentions"):
        if inputs.get(name) or (inputs.get(name) is None and getattr(config, name, False)):
            raise UnsupportedPlan(f"{name} would differ in length from layer to layer", "remove it while pruning")


class GenerateCall(threading.local):
    """The call of `generate` that runs in this thread.

    active: whether a call runs. arguments: its arguments, by name. copies: the number of rows in the batch for each
    prompt, for beams and `num_return_sequences`. encoder_scores: of encoders that it calls itself, before the prefill,
    by signal and call; of prompts that are not copied yet.
    """

    active = False
    arguments: Mapping[str, Any] = {}
    copies = 1
    encoder_scores: Mapping[Signal, list[Tensor]] = {}

    @contextmanager
    def run(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Record a call while it runs."""
        self.active, self.arguments, self.encoder_scores = True, arguments, defaultdict(list)
        try:
            yield
        finally:
            self.active, self.arguments, self.copies, self.encoder_scores = False, {}, 1, {}


@contextmanager
def guarded_generate(model: PreTrainedModel, call: GenerateCall) -> Iterator[None]:
    """While the context lasts, refuse generation that pruning would make silently wrong, and record each call.

    Checked are the arguments of `generate`; the generation config that results from them and the model's own settings,
    in `_prepare_generation_config`; drafts of any kind, in `_get_candidate_generator`; and continuous batching.
    """

    def generate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = signature(original).bind_partial(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.get("kwargs", {})}
        refuse_settings(arguments.get)
        if arguments.get("streamer") is not None and arguments.get("custom_generate") is not None:
            raise UnsupportedPlan("transformers passes no streamer to a custom loop", "pass it to fastav.Decoding")
        with call.run(arguments):
            return original(*args, **kwargs)

    def expand(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call.copies = signature(original).bind_partial(*args, **kwargs).arguments.get("expand_size", 1)
        return original(*args, **kwargs)

    def refuse_packing(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedPlan(
            f"{original.__name__} cannot be exact while pruning: continuous batching packs pieces of several prompts "
            "into one row, and its paged cache has one length for all layers",
            "call generate with a left-padded batch, or serve the model with vLLM (docs/vllm.md)",
        )

    def prepare(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        config, model_kwargs = original(*args, **kwargs)
        refuse_settings(lambda name: getattr(config, name, None))
        return config, model_kwargs

    def refuse_drafts(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedPlan(f"drafting {_DRAFTS}", "remove the assistant")

    guards = {
        "generate": generate,
        "_prepare_generation_config": prepare,
        "_get_candidate_generator": refuse_drafts,
        "_expand_inputs_for_generation": expand,
        **dict.fromkeys(_PACKING, refuse_packing),
    }
    with ExitStack() as stack:
        for name, guard in guards.items():
            if hasattr(model, name):
                stack.enter_context(patched(model, name, partial(guard, getattr(model, name))))
        yield


def check_copies(hidden: Tensor, copies: int) -> None:
    """Refuse a batch in which the copies of one prompt differ at the input of the first layer.

    For a prompt with several frames, images or sounds, some releases of transformers repeat each of them separately, so
    that copies of the prompt receive wrong media. On a GPU this waits for the device.
    hidden: [..., prompts x copies, tokens, features].  Raises: UnsupportedPlan.
    """
    rows = hidden.detach().unflatten(-3, (-1, copies)).float()
    difference = (rows - rows[..., :1, :, :]).norm(dim=-1)
    if bool((difference > _TOLERANCE.get(hidden.dtype, _COARSE) * rows.norm(dim=-1)).any()):
        raise UnsupportedPlan(
            "transformers gives copies of a prompt (num_beams, num_return_sequences) other frames, images or sounds "
            "than the prompt's own, with pruning and without",
            "remove these settings, or repeat the prompt in the batch once per answer",
        )


@contextmanager
def text_only(model: PreTrainedModel, adapter: ModelAdapter) -> Iterator[None]:
    """Refuse speech while the context lasts: a talker reads the hidden states of all tokens, also of dropped ones."""
    if not hasattr(model, "generate"):
        yield
        return
    original: Any = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        if (hint := adapter.text_only_hint(model, kwargs)) is not None:
            raise UnsupportedPlan(
                "speech cannot be exact while pruning: the talker reads the hidden states of dropped tokens", hint
            )
        return original(*args, **kwargs)

    with patched(model, "generate", generate):
        yield


def check_mask(mask: Tensor | None, layouts: Sequence[Layout], length: int, *, past: int = 0, wait: bool) -> None:
    """Refuse a batch whose rows do not end in as many real tokens as their layouts have.

    length: columns of the prompts. past: columns before them.
    wait: whether the check may wait for the device; otherwise a GPU checks by itself, and fails if they disagree.

    Raises: UnsupportedPlan.
    """
    lengths = [len(layout) for layout in layouts]
    if mask is None:
        if any(n != length for n in lengths):
            raise UnsupportedPlan(
                f"the prompts have {length} tokens, their layouts {lengths}, and there is no attention mask",
                "pass the attention mask, or one layout of full length per prompt",
            )
        return
    if mask.ndim != 2:
        return  # a custom mask, which is only accepted together with layouts
    if past and mask.shape[1] != past + length:
        raise UnsupportedPlan(
            f"the attention mask has {mask.shape[1]} columns, the cache and the new tokens {past} + {length}",
            "pass the attention mask of the whole conversation",
        )
    mask = mask[:, past:]
    expected = torch.arange(length)[None] >= length - torch.tensor(lengths)[:, None]
    if mask.is_cpu or wait:
        if mask.shape != expected.shape or not torch.equal(mask.bool().cpu(), expected):
            raise UnsupportedPlan(
                f"the attention mask marks {mask.bool().sum(1).tolist()} tokens, the layouts have {lengths}, "
                "or the marked tokens are not the last ones of each row",
                "pad on the left, without gaps",
            )
        return
    is_equal = (mask.bool() == upload(expected.numpy(), mask.device)).all()
    check: Any = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
    check(is_equal, "the attention mask and the layouts passed to fastav.prune disagree")


def check_token_types(model: PreTrainedModel, inputs: Mapping[str, Any], total: int) -> None:
    """Refuse a later turn whose images a model would not recognise in its mask, if they attend in both directions.

    Such models find the tokens of an image by their column among the token types, which have to be of the whole
    sequence. total: its length.  Raises: UnsupportedPlan.
    """
    make_masks = getattr(model, "create_masks_for_generate", None)
    names = {"token_type_ids", "mm_token_type_ids"} & set(signature(make_masks).parameters) if make_masks else ()
    is_causal = getattr(model.config.get_text_config(), "use_bidirectional_attention", "unknown") is None
    for name in () if is_causal else names:
        types = inputs.get(name)
        if not isinstance(types, Tensor) or types.shape[-1] != total:
            raise UnsupportedPlan(
                "attention within the images of a later turn would not be in both directions, because transformers "
                f"looks up {name} by the column of the whole conversation",
                f"pass {name} of all {total} tokens to forward; generate passes those of the new ones alone",
            )


@contextmanager
def patched(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of the instance while the context lasts."""
    attributes = vars(module)
    before = attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if before is None:
            del attributes[name]
        else:
            attributes[name] = before


def refuse_settings(setting: Callable[[str], Any]) -> None:
    """Refuse settings of `generate` that cannot be exact.  setting: the value by name.  Raises: UnsupportedPlan."""
    for name, (is_refused, reason) in _REFUSED.items():
        if is_refused(value := setting(name)):
            text = repr(value) if isinstance(value, bool | int | str) else "'...'"
            raise UnsupportedPlan(f"generate({name}={text}) cannot be exact while pruning: {reason}", f"remove {name}")
