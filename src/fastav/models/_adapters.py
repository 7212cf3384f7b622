"""Helpers of all adapters: presets, numpy arrays, layouts and the shape of Qwen2-like decoders."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedConfig

from fastav.flops import DecoderShape, LayerShape
from fastav.layout import Layout, Modality
from fastav.plan import Keep, Plan
from fastav.presets import fastav, plus, trim


def preset_plans(keep: Keep) -> dict[str, Plan]:
    """The preset plans of a family.  keep: what stays at the global cut of `fastav`."""
    return {"fastav": fastav(keep), "fastav-plus": plus(), "fastav-trim": trim()}


def to_numpy(values: Any) -> np.ndarray:
    """A tensor, or anything that numpy accepts, as an array in host memory."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def prompt_ids(inputs: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """The token ids of each prompt of a batch, without padding."""
    ids = to_numpy(inputs["input_ids"])
    mask = np.ones_like(ids) if inputs.get("attention_mask") is None else to_numpy(inputs["attention_mask"])
    for row, is_token in zip(ids, mask[:, -ids.shape[1] :].astype(bool), strict=True):
        yield row[is_token]


def iter_rows(inputs: Mapping[str, Any], name: str) -> Iterator[np.ndarray]:
    """The rows of an input; none if the input is missing."""
    value = inputs.get(name)
    return iter([] if value is None else to_numpy(value))


def layout_from_masks(
    video: np.ndarray,
    audio: np.ndarray,
    *,
    image: np.ndarray | None = None,
    frame: np.ndarray | None = None,
    padding: np.ndarray | None = None,
    box: np.ndarray | None = None,
) -> Layout:
    """The layout of a prompt about one clip, from masks of its video, audio and image tokens, each [tokens].

    box: [tokens, 4]. Seconds are unknown.
    """
    modality = np.where(video, Modality.VIDEO, np.where(audio, Modality.AUDIO, Modality.TEXT)).astype(np.int8)
    if image is not None:
        modality[image] = Modality.IMAGE
    item = np.where(modality == Modality.TEXT, -1, 0).astype(np.int32)
    text = Layout.of(Modality.TEXT, len(video), frame=frame, padding=padding, box=box)
    return replace(text, modality=modality, item=item)


def with_seconds(layout: Layout, second: np.ndarray) -> Layout:
    """The layout with the seconds of its tokens; NaN for padding."""
    return replace(layout, second=np.where(layout.padding, np.nan, second).astype(np.float32))


def qwen2_shape(config: PreTrainedConfig) -> DecoderShape:
    """The dimensions of a Qwen2-like decoder, from a configuration or its text part."""
    text: Any = config.get_text_config(decoder=True)
    return DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
    )


def sparse_shape(config: PreTrainedConfig) -> DecoderShape:
    """`qwen2_shape` for a decoder with mixtures of experts in all or some layers: the part that is active per token.

    A token passes through its experts and no shared one. The router, under 1 % of that, is not counted.
    """
    text: Any = config.get_text_config(decoder=True)
    shape, expert_width = qwen2_shape(config), text.num_experts_per_tok * text.moe_intermediate_size
    dense, stride = set(getattr(text, "mlp_only_layers", None) or ()), getattr(text, "decoder_sparse_step", 1)
    widths = [
        expert_width if index not in dense and (index + 1) % stride == 0 else text.intermediate_size
        for index in range(shape.layers)
    ]
    by_layer = tuple(
        LayerShape(intermediate=width, kv_heads=shape.kv_heads, head_dim=shape.head_dim) for width in widths
    )
    return replace(shape, intermediate=expert_width, by_layer=by_layer if len(set(widths)) > 1 else ())
