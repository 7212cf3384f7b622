"""Decoder layers out of which no token can be dropped exactly: they reach other tokens by more than attention.

Hiding a token by an attention mask and removing it are the same thing only if nothing but the mask connects tokens. A
state that runs along the sequence, a convolution over neighbours, or an index of stored keys all notice the gap.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

STATE = "a recurrent state (Mamba, linear attention) runs through every token, so a dropped one changes all later ones"
NEIGHBOURS = "a short convolution mixes each token with its neighbours, which dropping one would change"
INDEXED = "indexed attention chooses keys among those stored, so dropping one changes what others see"
CHUNKED = "attention within chunks is not followed while pruning"
EXACT = frozenset({"full_attention", "sliding_attention"})
_BY_TYPE = {  # as transformers names the types of layers
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
    """Why tokens cannot be dropped before layers of these types; None if they can."""
    strange = [kind for kind in types if kind not in EXACT]
    if not strange:
        return None
    return next((_BY_TYPE[kind] for kind in strange if kind in _BY_TYPE), f"layers of type {strange[0]} are not known")


def of_layer(layer: nn.Module) -> str | None:
    """Why tokens cannot be dropped before this layer, by what it is built of; None if nothing speaks against it."""
    names = {type(module).__name__ for module in layer.modules()}
    return next((why for pattern, why in _BY_CLASS.items() if any(map(pattern.search, names))), None)


def of_config(config: Mapping[Any, Any]) -> str | None:
    """Why tokens cannot be dropped in a model, by its config.json; None if nothing there speaks against it."""
    for key, value in _settings(config):
        if key in ("layer_types", "layers_block_type") and isinstance(value, list | tuple):
            known = [_BY_TYPE[kind] for kind in value if kind in _BY_TYPE]
            if known:
                return known[0]
        elif value and (key in _BY_KEY or key.startswith(("mamba_", "ssm_"))):
            return _BY_KEY.get(key, STATE)
    return None


def _settings(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """All settings but those of encoders and talkers, however deep they stand."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if not _ENCODERS.search(str(key)):
                yield from _settings(value)
        else:
            yield str(key), value
