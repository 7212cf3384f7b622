"""What a decoder's configuration says of its layers: kind of attention, window, and whose keys they read.

transformers has several styles of saying so (`layer_types`, `sliding_window` alone, `use_sliding_window`,
`max_window_layers`, `attention_chunk_size`). `DynamicCache` reads them all, so layers are asked for what it makes of
them.
"""

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from fastav import token_mixing
from fastav.errors import UnsupportedModel, UnsupportedPlan


def layer_types(config: PreTrainedConfig) -> list[str]:
    """What kind of attention each layer has, in transformers' words.

    Raises: UnsupportedModel if the configuration says so for some layers only.
    """
    if types := getattr(config, "layer_types", None):
        return list(types)
    if layers_with_cache(config) < config.num_hidden_layers:
        raise UnsupportedModel("layers share keys and values, and the configuration does not name each layer's type")
    sliding = getattr(config, "sliding_window", None) is not None
    return [_kind(layer, sliding=sliding) for layer in DynamicCache(config=config).layers]


def windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """How many tokens, itself included, a query of each layer sees at most; None if all."""
    types = layer_types(config)
    if token_mixing.of_types(types):
        return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in types)
    layers: list[Any] = DynamicCache(config=config).layers[: layers_with_cache(config)]
    own = [layer.sliding_window if layer.is_sliding else None for layer in layers]
    return tuple(own[source(config, index)] for index in range(len(types)))


def narrow(config: PreTrainedConfig) -> list[bool]:
    """Whether each layer's window is shorter than the longest sequence that the model is made for."""
    longest = getattr(config, "max_position_embeddings", None)
    return [window is not None and (longest is None or window < longest) for window in windows(config)]


def check_length(config: PreTrainedConfig, length: int) -> None:
    """Refuse a prompt that meets a window which no sequence that the model is made for would.

    Raises: UnsupportedPlan.
    """
    for window, slides in zip(windows(config), narrow(config), strict=True):
        if window is not None and window < length and not slides:
            raise UnsupportedPlan(
                f"a prompt of {length} tokens is longer than the window of {window} tokens, which is as long as any "
                f"sequence that the model is made for ({config.max_position_embeddings})",
                "ask about less of the clip",
            )


def check_types(config: PreTrainedConfig) -> None:
    """Refuse layers whose keys and values are not just those that attention has stored.  Raises: UnsupportedModel."""
    if strange := sorted(set(layer_types(config)) - token_mixing.EXACT):
        raise UnsupportedModel(
            f"Decoding holds keys and values of full and sliding attention, and layers here are {', '.join(strange)}",
            "leave custom_generate out",
        )


def layers_with_cache(config: PreTrainedConfig) -> int:
    """How many layers, the first ones, have keys and values of their own; later ones share theirs."""
    return config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)


def source(config: PreTrainedConfig, layer: int) -> int:
    """The layer whose keys and values this one reads: itself, or the last of its type that has its own."""
    owners = layers_with_cache(config)
    if layer < owners:
        return layer
    types = layer_types(config)
    return max(index for index in range(owners) if types[index] == types[layer])


def _kind(layer: Any, *, sliding: bool) -> str:
    """The type of a layer, by its cache.  sliding: whether the configuration has a window, which goes before chunks."""
    if not layer.is_sliding:
        return "full_attention"
    return "sliding_attention" if sliding else "chunked_attention"
