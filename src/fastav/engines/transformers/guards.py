"""What cannot be exact is refused before it runs, in words."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from fastav import mixing
from fastav.adapter import ModelAdapter
from fastav.engines.transformers.buffers import StepCache
from fastav.engines.transformers.decoder_layers import layer_types, layers_with_cache, narrow
from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.method import Method, Signal

_DRAFTS = "puts draft tokens into the prefill, which shifts the last query"
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {  # settings of generate: which values, and why
    "assistant_model": (bool, f"assisted decoding {_DRAFTS}"),
    "prompt_lookup_num_tokens": (bool, f"prompt lookup {_DRAFTS}"),
    "assistant_early_exit": (bool, f"early-exit drafting {_DRAFTS}"),
    "use_mtp": (bool, f"multi-token prediction {_DRAFTS}"),
    "prefill_chunk_size": (bool, "a chunked prefill scores every chunk by that chunk's own last query"),
    "custom_generate": (
        lambda value: bool(value) and not getattr(value, "exact_while_pruning", False),
        "custom generation code may not keep the cache (fastav.Decoding does)",
    ),
    "guidance_scale": (
        lambda value: value not in (None, 1),
        "guidance runs the model on a second prompt beside this one, which would be pruned by a last query of its own",
    ),
    "use_cache": (lambda value: value is False, "without a cache every token would prune anew, by another last query"),
    "cache_implementation": (
        lambda value: value not in (None, "dynamic", "hybrid"),
        "this cache cannot hold layers of different lengths",
    ),
}
_PACKING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-3,
}  # between copies of a prompt, whose media are encoded in a batch
_COARSE = 5e-2  # in other dtypes


OUTSIDE = frozenset({Signal.GIVEN, Signal.ENCODER})  # signals that no decoder layer computes


def check_decoder(config: PreTrainedConfig, cuts: tuple[tuple[int, Method], ...]) -> None:
    """Refuse layers that mix neighbouring tokens, kernels without a tap, and scores that no layer computes.

    Raises: UnsupportedModel, UnsupportedPlan.
    """
    types, owners = layer_types(config), layers_with_cache(config)
    for layer, method in cuts:
        if why := mixing.of_types(types[layer:]):
            raise UnsupportedModel(f"no token can be dropped entering layer {layer}: {why}")
        if layer >= owners:
            raise UnsupportedPlan(
                f"layer {layer} has no keys and values but shares those of layers before {owners}, so what is dropped "
                "entering it would be seen all the same",
                f"place the last step at layer {owners - 1} or before",
            )
        if method.merges and getattr(config, "altup_num_inputs", 1) > 1:
            raise UnsupportedPlan(
                f"{type(method).__name__} merges tokens, and this decoder stacks several hidden states of each",
                "take a method that only drops",
            )
        if not (of_decoder := method.needs - OUTSIDE):
            continue
        if layer == 0:
            named = ", ".join(sorted(of_decoder))
            raise UnsupportedPlan(f"no layer has attended yet when layer 0 is entered ({named})", "start at layer 1")
        if not method.needs & {Signal.LAST_QUERY, Signal.TEXT_QUERIES, Signal.WINDOW}:
            continue
        if narrow(config)[layer - 1]:
            raise UnsupportedPlan(
                f"layer {layer - 1} attends within a window, so its last query cannot score all tokens",
                "place the step after a layer of full attention",
            )


def check_encoder(adapter: ModelAdapter, methods: Iterable[Method]) -> None:
    """Refuse methods that ask for attention which the model's adapter does not find.  Raises: UnsupportedPlan."""
    for method in methods:
        if Signal.ENCODER in method.needs and adapter.audio_attention() is None:
            raise UnsupportedPlan(
                f"{type(method).__name__} asks for the audio encoder's attention, and the adapter of {adapter.name} "
                "does not tell where that is",
                "take a method that does not need it, or another model: docs/methods.md lists those that tell",
            )


def check_caches(config: PreTrainedConfig, cuts: tuple[tuple[int, Method], ...]) -> None:
    """Refuse to merge in caches, or to drop from those that are another layer's, or hold a window only.

    Raises: UnsupportedPlan.
    """
    for layer, method in cuts:
        if method.merges:
            raise UnsupportedPlan(
                f"{type(method).__name__} merges tokens, which are keys and values when a layer's cache alone is cut",
                "leave cache_only out, or take a method that only drops",
            )
        if layer >= (owners := layers_with_cache(config)):
            raise UnsupportedPlan(f"layer {layer} has no cache of its own", f"place the step before layer {owners}")
        if narrow(config)[layer]:
            raise UnsupportedPlan(
                f"layer {layer} attends within a window, and its cache holds no more", "name layers of full attention"
            )


def check_layers(layers: Sequence[nn.Module]) -> None:
    """Refuse layers that are built of more than attention, whatever their configuration says.

    Raises: UnsupportedModel.
    """
    for layer in layers:
        if why := mixing.of_layer(layer):
            raise UnsupportedModel(f"{type(layer).__name__} cannot be pruned: {why}")


def check_attention(config: PreTrainedConfig, implementation: str | None, first: int) -> None:
    """Refuse attention whose masks the engine cannot follow.  first: the first pruned layer.

    Raises: UnsupportedPlan.
    """
    flash = implementation is not None and "flash" in implementation
    if flash and layers_with_cache(config) < config.num_hidden_layers:
        raise UnsupportedPlan(
            "flash attention takes a layer's queries for its last keys, which they are not where keys are shared",
            "load the model with attn_implementation='sdpa'",
        )
    if flash and any(narrow(config)[first:]):
        raise UnsupportedPlan(
            "flash attention counts its sliding window in stored keys, which are not neighbours after pruning",
            "load the model with attn_implementation='sdpa', or prune after the last sliding-window layer",
        )
    if not (implementation in ("eager", "sdpa") or flash):
        raise UnsupportedPlan(
            f"attention {implementation!r} is not supported while pruning",
            "load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'",
        )


def check_cache(cache: Cache | None) -> None:
    """Refuse caches whose layers must all have one length or place.  Raises: UnsupportedPlan."""
    if cache is None or isinstance(cache, StepCache):
        return
    if type(cache) is DynamicCache and not getattr(cache, "offloading", False):
        return
    kind = "an offloaded cache" if type(cache) is DynamicCache else type(cache).__name__
    raise UnsupportedPlan(f"{kind} cannot hold layers of different lengths", "use a DynamicCache")


def check_model(model: Any) -> None:
    """Refuse what wraps a model: the engine's hooks must stand on the model itself.  Raises: UnsupportedModel."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a transformers model",
            "pass the model inside: the module that was given to torch.compile, FSDP or DataParallel",
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModel("a model compiled as a whole cannot be pruned", "compile its decoder layers instead")


def check_call(inputs: Mapping[str, Any], config: PreTrainedConfig, decoder: nn.Module) -> None:
    """Refuse what asks for places that pruning drops.  Raises: UnsupportedPlan."""
    tensors = (*inputs.values(), *decoder.parameters()) if torch.is_grad_enabled() else ()
    if any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        raise UnsupportedPlan("pruning drops gradients with the tokens", "run under torch.inference_mode()")
    if inputs.get("labels") is not None:
        raise UnsupportedPlan(
            "a label after a dropped token would be compared with nothing", "compute the loss from the logits of text"
        )
    for name in ("output_hidden_states", "output_attentions"):
        if inputs.get(name) or (inputs.get(name) is None and getattr(config, name, False)):
            raise UnsupportedPlan(f"{name} would differ in length from layer to layer", "leave it out while pruning")


@contextmanager
def guarded_generate(model: PreTrainedModel, local: Any) -> Iterator[None]:
    """While active, generation refuses what pruning would make silently wrong.

    `generate` itself is guarded for its arguments; `_prepare_generation_config` for what becomes of them and of the
    model's own settings, on every path; `_get_candidate_generator` for drafts of any kind; and what begins continuous
    batching.
    local: gets `generating`, True while `generate` runs in a thread, `asked`, the arguments that it was given, and
    `copies`, how many times each prompt stands in the batch (for beams and `num_return_sequences`).
    """

    def generate(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = signature(plain).bind_partial(*args, **kwargs).arguments
        _refuse({**given, **given.get("kwargs", {})}.get)
        if given.get("streamer") is not None and given.get("custom_generate") is not None:
            raise UnsupportedPlan("transformers hands no streamer to a custom loop", "give it to fastav.Decoding")
        local.generating, local.asked = True, {**given, **given.get("kwargs", {})}
        try:
            return plain(*args, **kwargs)
        finally:
            local.generating, local.asked, local.copies = False, {}, 1

    def expand(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        local.copies = signature(plain).bind_partial(*args, **kwargs).arguments.get("expand_size", 1)
        return plain(*args, **kwargs)

    def packed(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedPlan(
            f"{plain.__name__} cannot be exact while pruning: continuous batching packs pieces of several prompts into "
            "one row, and its paged cache has one length for all layers",
            "call generate with a left-padded batch, or serve the model with vLLM (docs/vllm.md)",
        )

    def prepare(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        config, rest = plain(*args, **kwargs)
        _refuse(lambda name: getattr(config, name, None))
        return config, rest

    def candidates(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedPlan(f"drafting {_DRAFTS}", "leave the assistant out")

    guarded = {
        "generate": generate,
        "_prepare_generation_config": prepare,
        "_get_candidate_generator": candidates,
        "_expand_inputs_for_generation": expand,
        **dict.fromkeys(_PACKING, packed),
    }
    with ExitStack() as stack:
        for name, guard in guarded.items():
            if hasattr(model, name):
                stack.enter_context(shadowed(model, name, partial(guard, getattr(model, name))))
        yield


def check_copies(hidden: Tensor, copies: int) -> None:
    """Refuse a batch in which copies of one prompt are not alike when the first layer is entered.

    Some releases of transformers repeat frames, images or sounds one by one where a prompt has several, so that its
    copies are given media of each other. On a GPU this waits for the device.
    hidden: [..., prompts x copies, tokens, features].  Raises: UnsupportedPlan.
    """
    rows = hidden.detach().unflatten(-3, (-1, copies)).float()
    apart = (rows - rows[..., :1, :, :]).norm(dim=-1)
    if bool((apart > _TOLERANCE.get(hidden.dtype, _COARSE) * rows.norm(dim=-1)).any()):
        raise UnsupportedPlan(
            "transformers gives copies of a prompt (num_beams, num_return_sequences) other frames, images or sounds "
            "than the prompt's own here, with pruning and without",
            "leave them out, or put the prompt into the batch as often as you want answers",
        )


@contextmanager
def speechless(model: PreTrainedModel) -> Iterator[None]:
    """While active, a model that also speaks is refused speech: its talker reads hidden states of every token."""
    if not hasattr(model, "generate"):
        yield
        return
    plain: Any = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        silent = kwargs.get("return_audio") is False or kwargs.get("generation_mode") in ("text", False)
        if getattr(model, "has_talker", False) and not silent:
            raise UnsupportedPlan(
                "speech cannot be exact while pruning: the talker reads the hidden states of tokens that are dropped",
                "ask for text only: generation_mode='text' (Qwen2.5-Omni), return_audio=False (Qwen3-Omni)",
            )
        return plain(*args, **kwargs)

    with shadowed(model, "generate", generate):
        yield


@contextmanager
def shadowed(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance, for a while."""
    own = vars(module)
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


def _refuse(setting: Callable[[str], Any]) -> None:
    for name, (refused, reason) in _REFUSED.items():
        if refused(value := setting(name)):
            shown = value if isinstance(value, bool | int | str) else "..."
            raise UnsupportedPlan(
                f"generate({name}={shown!r}) cannot be exact while pruning: {reason}", f"leave {name} out"
            )
