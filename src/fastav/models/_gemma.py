"""What Gemma 3n and Gemma 4 share: sound in pieces of 30 s, and layers of two kinds that share keys and values."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int
from transformers import PreTrainedConfig

from fastav.errors import MediaError
from fastav.flops import DecoderShape, LayerShape
from fastav.media import Clip
from fastav.plan import Keep, Plan, Share, Step

RATE = 16_000
PIECE = 30 * RATE  # samples of the longest sound that the feature extractors take; they cut off the rest
LEAST = RATE // 10  # a last piece of less would not fill one token
PAPER = 0.8  # what stays at each of the paper's fine cuts


def pieces(clip: Clip) -> list[Float32[np.ndarray, " samples"]]:
    """A clip's sound in pieces of 30 s; a rest of under 0.1 s is left out.  Raises: MediaError if that is all."""
    sound = np.asarray(clip.require_audio().read(RATE), np.float32)
    parts = [sound[start : start + PIECE] for start in range(0, len(sound), PIECE)]
    parts = [part for part in parts if len(part) >= LEAST]
    if not parts:
        raise MediaError(f"{clip.name} has under 0.1 s of sound", "ask with use='video' (--use video)")
    return parts


def lengths(seconds: float | int) -> list[int]:
    """How many samples the pieces of so much sound have."""
    samples = max(round(seconds * RATE), LEAST)
    return [n for start in range(0, samples, PIECE) if (n := min(samples - start, PIECE)) >= LEAST]


def runs(places: Bool[np.ndarray, " tokens"]) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """Which run of neighbouring places each token is of, and its place there; both -1 elsewhere."""
    starts = places & ~np.concatenate([[False], places[:-1]])
    number = np.cumsum(starts) - 1
    place = np.arange(len(places)) - np.flatnonzero(starts)[number] if starts.any() else number
    return np.where(places, number, -1), np.where(places, place, -1)


def gemma_plan(keep: Keep, *, first: int, later: int, images: bool) -> Plan:
    """The preset `fastav` for layers most of which attend within a window, and the last of which share keys and values.

    keep: what stays at the cut by position. first: its layer, the middle one of those with keys and values of their
    own. later: the last of those that follows a layer of full attention, which alone scores all tokens. There the one
    fine cut keeps what as many of the paper's as there are layers between would keep. images: whether images stand
    beside the clip, with a budget of their own; otherwise they are its frames.
    """
    share = Share(round(PAPER ** (later - first), 2))
    return Plan(
        (
            Step(layers=str(first), method="position", keep=keep),
            Step(
                layers=str(later),
                method="last-query",
                keep=Keep(clip=share, image=share) if images else Keep(media=share),
            ),
        ),
        "fastav",
    )


def gemma_shape(config: PreTrainedConfig) -> DecoderShape:
    """The dimensions of the part of a configuration for text, layer by layer; first those of the first layer.

    Left out are what Gemma adds to every layer for its own embeddings of tokens (and Gemma 3n's AltUp and Laurel),
    which are narrow.
    """
    text: Any = config.get_text_config(decoder=True)
    owners = text.num_hidden_layers - text.num_kv_shared_layers
    by_layer = tuple(_layer(text, index, shared=index >= owners) for index in range(text.num_hidden_layers))
    return DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=by_layer[0].intermediate,
        heads=text.num_attention_heads,
        kv_heads=by_layer[0].kv_heads,
        head_dim=by_layer[0].head_dim,
        vocab=text.vocab_size,
        windows=tuple(text.sliding_window if kind == "sliding_attention" else 0 for kind in text.layer_types),
        kv_layers=owners,
        by_layer=by_layer if len(set(by_layer)) > 1 else (),
    )


def _layer(text: Any, index: int, *, shared: bool) -> LayerShape:
    """One layer's dimensions. shared: whether it reads the keys and values of an earlier layer."""
    own = text.per_layer_config[index] if getattr(text, "per_layer_config", None) else text
    sizes = text.intermediate_size
    width = sizes if isinstance(sizes, int) else sizes[index]
    width *= 2 if shared and getattr(text, "use_double_wide_mlp", False) else 1
    if getattr(text, "enable_moe_block", False):
        width += text.top_k_experts * text.moe_intermediate_size
    keys_alone = getattr(text, "attention_k_eq_v", False) and text.layer_types[index] == "full_attention"
    return LayerShape(
        intermediate=width,
        kv_heads=own.num_key_value_heads,
        head_dim=own.head_dim,
        own_values=not keys_alone,
    )
