"""What cannot be exact is refused before it runs, in words."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.method import Method, Signal

_GENERATE_WITHOUT = {
    "assistant_model": "assisted decoding puts draft tokens into the prefill, which shifts the last query",
    "prompt_lookup_num_tokens": "prompt lookup puts draft tokens into the prefill, which shifts the last query",
    "assistant_early_exit": "early-exit drafting puts draft tokens into the prefill, which shifts the last query",
    "prefill_chunk_size": "a chunked prefill scores every chunk by that chunk's own last query",
    "custom_generate": "custom generation code may not keep the cache",
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_decoder(config: PreTrainedConfig, cuts: tuple[tuple[int, Method], ...]) -> None:
    """Refuse layers that mix neighbouring tokens, kernels without a tap, and scores that no layer computes.

    Raises: UnsupportedModel, UnsupportedPlan.
    """
    types = layer_types(config)
    for layer, method in cuts:
        if strange := set(types[layer:]) - _LAYER_TYPES:
            raise UnsupportedModel(
                f"layers of type {', '.join(sorted(strange))} mix neighbouring tokens: none can be dropped before them"
            )
        if Signal.LAST_QUERY not in method.needs:
            continue
        if layer == 0:
            raise UnsupportedPlan("no layer has attended yet when layer 0 is entered", "start last-query at layer 1")
        if types[layer - 1] == "sliding_attention":
            raise UnsupportedPlan(
                f"layer {layer - 1} attends within a window, so its last query cannot score all tokens",
                "place the step after a layer of full attention",
            )


def layer_types(config: PreTrainedConfig) -> list[str]:
    """What kind of attention each layer has."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def check_attention(implementation: str | None, pruned: Collection[str]) -> None:
    """Refuse attention whose masks the engine cannot follow.  pruned: types of the pruned layers.

    Raises: UnsupportedPlan.
    """
    if implementation is not None and "flash" in implementation and "sliding_attention" in pruned:
        raise UnsupportedPlan(
            "flash attention counts its sliding window in stored keys, which are not neighbours after pruning",
            "load the model with attn_implementation='sdpa', or prune after the last sliding-window layer",
        )
    if implementation is None or not (implementation in ("eager", "sdpa") or "flash" in implementation):
        raise UnsupportedPlan(
            f"attention {implementation!r} is not supported while pruning",
            "load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'",
        )


def check_device(decoder: nn.Module) -> None:
    """Refuse a decoder that is spread over several devices.  Raises: UnsupportedPlan."""
    if len(devices := {str(p.device) for p in decoder.parameters()}) > 1:
        raise UnsupportedPlan(
            f"the decoder is spread over {', '.join(sorted(devices))}", "load the model onto one device to prune it"
        )


def check_cache(cache: Cache | None) -> None:
    """Refuse caches whose layers must all have one length or place.  Raises: UnsupportedPlan."""
    if cache is None or (type(cache) is DynamicCache and not getattr(cache, "offloading", False)):
        return
    kind = "an offloaded cache" if type(cache) is DynamicCache else type(cache).__name__
    raise UnsupportedPlan(f"{kind} cannot hold layers of different lengths", "use a DynamicCache")


@contextmanager
def guarded_generate(model: PreTrainedModel) -> Iterator[None]:
    """While active, `model.generate` refuses ways of generating that pruning would make silently wrong."""
    plain: Callable[..., Any] = model.generate  # pyright: ignore[reportAssignmentType]
    before = model.__dict__.get("generate")

    def generate(*args: Any, **kwargs: Any) -> Any:
        _check_generate(model, kwargs)
        return plain(*args, **kwargs)

    model.__dict__["generate"] = generate
    try:
        yield
    finally:
        if before is None:
            del model.__dict__["generate"]
        else:
            model.__dict__["generate"] = before


def _check_generate(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def setting(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    for name, reason in _GENERATE_WITHOUT.items():
        if setting(name) is not None:
            raise UnsupportedPlan(f"generate({name}=...) cannot be exact while pruning: {reason}", f"leave {name} out")
    if setting("use_cache") is False:
        raise UnsupportedPlan(
            "generate(use_cache=False) would prune anew at every token, by another last query", "leave use_cache on"
        )
    if setting("cache_implementation") not in (None, "dynamic"):
        raise UnsupportedPlan(
            f"cache_implementation={setting('cache_implementation')!r} cannot hold layers of different lengths",
            "leave it out",
        )
