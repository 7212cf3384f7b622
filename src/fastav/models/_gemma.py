"""Code shared by Gemma 3n and Gemma 4: audio in pieces of 30 s, and layers of two kinds that share keys and values."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int
from transformers import PreTrainedConfig

from fastav.budgets import Share
from fastav.errors import MediaError
from fastav.flops import DecoderShape, LayerShape
from fastav.layout import Modality
from fastav.media import Clip
from fastav.plan import Keep, Plan, Step

RATE = 16_000  # samples per second
PIECE = 30 * RATE  # samples; the feature extractors cut off longer audio
MIN_SAMPLES = RATE // 10  # a shorter last piece has no token
PAPER_SHARE = 0.8  # what the paper keeps at each of its fine cuts


def follows_picture(previous: Modality, modality: Modality, touches: bool) -> bool:
    """Whether a piece of sound is of the video or sound before it."""
    return modality is Modality.AUDIO and previous in (Modality.VIDEO, Modality.AUDIO)


def audio_pieces(clip: Clip, name: str) -> list[Float32[np.ndarray, " samples"]]:
    """A clip's audio in pieces of 30 s, without a last one of under 0.1 s.  Raises: MediaError if no piece is left."""
    audio = np.asarray(clip.require_audio().read(RATE), np.float32)
    pieces = [audio[start : start + PIECE] for start in range(0, len(audio), PIECE)]
    pieces = [piece for piece in pieces if len(piece) >= MIN_SAMPLES]
    if not pieces:
        raise MediaError(f"{name} has less than 0.1 s of audio", "ask with use='video' (--use video)")
    return pieces


def piece_lengths(seconds: float | int) -> list[int]:
    """The number of samples of each piece of audio of this length."""
    samples = max(round(seconds * RATE), MIN_SAMPLES)
    return [n for start in range(0, samples, PIECE) if (n := min(samples - start, PIECE)) >= MIN_SAMPLES]


def token_runs(mask: Bool[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
    """For each token of the mask, the number of its run of consecutive tokens; -1 elsewhere."""
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    return np.where(mask, np.cumsum(starts) - 1, -1)


def gemma_plan(keep: Keep, *, position_layer: int, fine_layer: int, has_images: bool) -> Plan:
    """The preset `fastav` for decoders of mostly sliding-window layers, the last of which share keys and values.

    keep: what stays at the cut by position. position_layer: its layer, the middle one of those that compute keys and
    values. fine_layer: the last of those that follows a layer of full attention, since only such a layer scores all
    tokens. The one fine cut there keeps what the paper's fine cuts would keep together, one for each layer between the
    two. has_images: whether a prompt can have images beside the clip, with their own budget; otherwise images are the
    clip's frames.
    """
    share = Share(round(PAPER_SHARE ** (fine_layer - position_layer), 2))
    return Plan(
        (
            Step(layers=str(position_layer), method="position", keep=keep),
            Step(
                layers=str(fine_layer),
                method="last-query",
                keep=Keep(clip=share, image=share) if has_images else Keep(media=share),
            ),
        ),
        "fastav",
    )


def gemma_shape(config: PreTrainedConfig) -> DecoderShape:
    """The dimensions of the text decoder: of its first layer, and of every layer if they differ.

    Gemma's narrow additions to every layer are not counted: per-layer inputs, and Gemma 3n's AltUp and LAuReL.
    """
    text: Any = config.get_text_config(decoder=True)
    kv_layers = text.num_hidden_layers - text.num_kv_shared_layers
    by_layer = tuple(_layer(text, index, is_shared=index >= kv_layers) for index in range(text.num_hidden_layers))
    return DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=by_layer[0].intermediate,
        heads=text.num_attention_heads,
        kv_heads=by_layer[0].kv_heads,
        head_dim=by_layer[0].head_dim,
        vocab=text.vocab_size,
        windows=tuple(text.sliding_window if kind == "sliding_attention" else 0 for kind in text.layer_types),
        kv_layers=kv_layers,
        by_layer=by_layer if len(set(by_layer)) > 1 else (),
    )


def _layer(text: Any, index: int, *, is_shared: bool) -> LayerShape:
    """The dimensions of one layer.  is_shared: whether it reads the keys and values of an earlier layer."""
    layer = text.per_layer_config[index] if getattr(text, "per_layer_config", None) else text
    sizes = text.intermediate_size
    width = sizes if isinstance(sizes, int) else sizes[index]
    width *= 2 if is_shared and getattr(text, "use_double_wide_mlp", False) else 1
    if getattr(text, "enable_moe_block", False):
        width += text.top_k_experts * text.moe_intermediate_size
    keys_as_values = getattr(text, "attention_k_eq_v", False) and text.layer_types[index] == "full_attention"
    return LayerShape(
        intermediate=width,
        kv_heads=layer.num_key_value_heads,
        head_dim=layer.head_dim,
        own_values=not keys_as_values,
    )
