"""Properties of a decoder's layers, from its configuration: kind of attention, window, and the source of their keys.

Configurations of transformers state these in several ways (`layer_types`, `sliding_window` alone, `use_sliding_window`,
`max_window_layers`, `attention_chunk_size`). `DynamicCache` reads them all, so this module reads the layers that it
creates.
"""

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from fastav import token_mixing
from fastav.errors import UnsupportedModel, UnsupportedPlan


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The kind of attention of each layer, by the names of transformers.

    Raises: UnsupportedModel if the configuration gives it only for some layers.
    """
    if types := getattr(config, "layer_types", None):
        return list(types)
    if layers_with_cache(config) < _depth(config):
        raise UnsupportedModel("layers share keys and values, and the configuration does not name each layer's type")
    sliding = getattr(config, "sliding_window", None) is not None
    return [_kind(layer, sliding=sliding) for layer in DynamicCache(config=config).layers]


def windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The window of each layer in tokens, the query included; None for full attention."""
    types = layer_types(config)
    if token_mixing.of_types(types):
        return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in types)
    layers: list[Any] = DynamicCache(config=config).layers[: layers_with_cache(config)]
    windows_with_cache = [layer.sliding_window if layer.is_sliding else None for layer in layers]
    return tuple(windows_with_cache[source(config, index)] for index in range(len(types)))


def narrow(config: PreTrainedConfig) -> list[bool]:
    """Whether each layer's window is shorter than the model's maximum sequence length."""
    max_length = getattr(config, "max_position_embeddings", None)
    return [window is not None and (max_length is None or window < max_length) for window in windows(config)]


def check_length(config: PreTrainedConfig, length: int) -> None:
    """Refuse a prompt that is longer than a window which covers the model's maximum sequence length.

    Raises: UnsupportedPlan.
    """
    for window, is_narrow in zip(windows(config), narrow(config), strict=True):
        if window is not None and window < length and not is_narrow:
            raise UnsupportedPlan(
                f"a prompt of {length} tokens is longer than the window of {window} tokens, which covers the model's "
                f"maximum sequence length ({getattr(config, 'max_position_embeddings', None)})",
                "ask about a shorter part of the clip",
            )


def check_types(config: PreTrainedConfig) -> None:
    """Refuse layers with other state than the keys and values of attention.  Raises: UnsupportedModel."""
    if unsupported := sorted(set(layer_types(config)) - token_mixing.EXACT):
        raise UnsupportedModel(
            f"Decoding supports layers of full and sliding attention, and this model has {', '.join(unsupported)}",
            "remove custom_generate",
        )


def layers_with_cache(config: PreTrainedConfig) -> int:
    """The number of layers, from the first, that have keys and values of their own; later layers share them."""
    return _depth(config) - (getattr(config, "num_kv_shared_layers", None) or 0)


def source(config: PreTrainedConfig, layer: int) -> int:
    """The layer whose keys and values a layer reads: itself, or the last of its type that has its own."""
    n_kv_layers = layers_with_cache(config)
    if layer < n_kv_layers:
        return layer
    types = layer_types(config)
    return max(index for index in range(n_kv_layers) if types[index] == types[layer])


def _depth(config: PreTrainedConfig) -> int:
    decoder: Any = config  # depth is an attribute of each model's own configuration class
    return decoder.num_hidden_layers


def _kind(layer: Any, *, sliding: bool) -> str:
    """The type of a layer, by its cache.  sliding: whether the configuration has a window, which outranks chunks."""
    if not layer.is_sliding:
        return "full_attention"
    return "sliding_attention" if sliding else "chunked_attention"
