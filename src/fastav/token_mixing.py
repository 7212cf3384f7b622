"""Decoder layers whose tokens cannot be dropped exactly, because they mix tokens by more than attention.

Removing a token equals hiding it by an attention mask only if tokens interact through masked attention alone. A
recurrent state, a convolution over neighbours and an index of stored keys all change when a token is missing.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

STATE = "a recurrent state (Mamba, linear attention) runs through every token, so dropping one changes all later ones"
NEIGHBOURS = "a short convolution mixes each token with its neighbours, so dropping one changes them"
INDEXED = "indexed attention chooses among the stored keys, so dropping one changes what other tokens attend to"
CHUNKED = "attention within chunks is not supported while pruning"
EXACT = frozenset({"full_attention", "sliding_attention"})
_BY_TYPE = {  # keys: the types of layers in transformers
    "linear_attention": STATE,
    "mamba": STATE,
    "mamba2": STATE,
    "hybrid": STATE,
    "hybrid_sliding": STATE,
    "conv": NEIGHBOURS,
    "indexed_attention": INDEXED,
    "deepseek_sparse_attention": INDEXED,
    "compressed_sparse_attention": INDEXED,
    "heavily_compressed_attention": INDEXED,
    "chunked_attention": CHUNKED,
}
_BY_KEY = {"index_topk": INDEXED, "conv_L_cache": NEIGHBOURS, "hybrid_override_pattern": STATE}
_BY_CLASS = {
    re.compile(r"Mamba|SSM|DeltaNet|LinearAttention|LightningAttention|RWKV|Rwkv|RecurrentBlock"): STATE,
    re.compile(r"ShortConv"): NEIGHBOURS,
    re.compile(r"Indexer"): INDEXED,
}
_ENCODERS = re.compile(r"audio|vision|speech|talker|token2wav|code2wav")


def of_types(types: Collection[str]) -> str | None:
    """The reason why tokens cannot be dropped before layers of these types; None if they can."""
    unsupported = [kind for kind in types if kind not in EXACT]
    if not unsupported:
        return None
    reasons = (_BY_TYPE[kind] for kind in unsupported if kind in _BY_TYPE)
    return next(reasons, f"layers of type {unsupported[0]} are unknown")


def of_layer(layer: nn.Module) -> str | None:
    """The reason, by the classes of its modules, why tokens cannot be dropped before a layer; None if none is known."""
    names = {type(module).__name__ for module in layer.modules()}
    return next((reason for pattern, reason in _BY_CLASS.items() if any(map(pattern.search, names))), None)


def of_config(config: Mapping[Any, Any]) -> str | None:
    """The reason, from its config.json, why tokens cannot be dropped in a model; None if none is known."""
    for key, value in _settings(config):
        if key in ("layer_types", "layers_block_type") and isinstance(value, list | tuple):
            reasons = [_BY_TYPE[kind] for kind in value if kind in _BY_TYPE]
            if reasons:
                return reasons[0]
        elif value and (key in _BY_KEY or key.startswith(("mamba_", "ssm_"))):
            return _BY_KEY.get(key, STATE)
    return None


def _settings(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """All settings at any depth, except those of encoders and talkers."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if not _ENCODERS.search(str(key)):
                yield from _settings(value)
        else:
            yield str(key), value
