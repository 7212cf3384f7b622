"""BEATs: a transformer over patches of a mel filter bank.

Source: arXiv:2212.09058; the relative position bias is T5's (arXiv:1910.10683), gated as in WavLM (arXiv:2110.13900).
"""

import math
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastav.models.videollama2.configuration import BeatsShape

FBANK_MEAN, FBANK_STD = 15.41663, 6.55582
BLOCK = 256  # queries whose attention is held at once


def relative_buckets(tokens: int, buckets: int, farthest: int, device: torch.device) -> Int[Tensor, " offsets"]:
    """The bucket of every offset key - query, from -(tokens - 1) to tokens - 1.

    Half the buckets are for each sign; of those, half are exact, the others grow with the logarithm up to `farthest`.

    Source: arXiv:1910.10683, section 2.1.
    """
    offsets = torch.arange(1 - tokens, tokens, device=device)
    half, exact = buckets // 2, buckets // 4
    distance = offsets.abs()
    scale = (half - exact) / math.log(farthest / exact)
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
    bucket = torch.where(distance < exact, distance, far.clamp(max=half - 1))
    return bucket + half * (offsets > 0)


class PositionConv(nn.Module):
    """A grouped convolution over time whose weight is a direction per kernel tap times a gain.

    The norm runs over output and input channels together, in float32, with 1e-6 inside the root.

    Differs: `torch.nn.utils.weight_norm` has no such term; the original patches it in.
    """

    def __init__(self, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, groups
        self.bias = nn.Parameter(torch.zeros(channels))
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.ones(channels, channels // groups, kernel))

    @property
    def weight(self) -> Tensor:
        """The kernel [out, in / groups, taps], in the dtype of the parameters."""
        direction = self.weight_v.float()
        norm = (direction.square().sum((0, 1), keepdim=True) + 1e-6).sqrt()
        return (self.weight_g.float() * direction / norm).to(self.weight_v.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, channels], same out: an even kernel gives one step more, which is dropped."""
        out = nn.functional.conv1d(
            hidden.transpose(1, 2), self.weight, self.bias, padding=self.kernel // 2, groups=self.groups
        )
        return nn.functional.gelu(out[..., : hidden.shape[1]]).transpose(1, 2)


class BeatsAttention(nn.Module):
    """Attention with a relative position bias that every layer gates by its own queries.

    Every layer holds the bias table, as the original's checkpoints do, but only the first layer's is read.
    """

    def __init__(self, config: PreTrainedConfig, shape: BeatsShape) -> None:
        super().__init__()
        width, self.heads = shape.encoder_embed_dim, shape.encoder_attention_heads
        self.config, self.farthest = config, shape.max_distance
        self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))
        self.relative_attention_bias = nn.Embedding(shape.num_buckets, self.heads)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // self.heads, 8)

    def position_bias(self, tokens: int, device: torch.device) -> Float[Tensor, "1 heads tokens tokens"]:
        """The ungated bias. It depends on key - query alone, so the rows are windows of one line of offsets."""
        table = self.relative_attention_bias
        buckets = relative_buckets(tokens, table.num_embeddings, self.farthest, device)
        return table(buckets).T.unfold(1, tokens, 1).flip(1)[None]

    def forward(self, hidden: Tensor, position_bias: Tensor) -> tuple[Tensor, Tensor | None]:
        """[batch, tokens, width], same out; and the map [batch, heads, tokens, tokens] where one is made."""
        query, key, value = (self._split(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj))
        bias = self._gate(query) * position_bias
        mixed, weights = self._attend(query, key, value, bias)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), weights

    def received_attention(
        self, hidden: Float[Tensor, "batch tokens width"], position_bias: Float[Tensor, "1 heads tokens tokens"]
    ) -> Float[Tensor, "batch tokens"]:
        """The attention that each token receives, mean over heads and queries, in float32; in blocks of queries."""
        query, key = self._split(self.q_proj(hidden)), self._split(self.k_proj(hidden))
        gate, tokens = self._gate(query), hidden.shape[1]
        total = torch.zeros(hidden.shape[:2], device=hidden.device)
        for start in range(0, tokens, BLOCK):
            rows = slice(start, start + BLOCK)
            scores = (query[:, :, rows] * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
            scores = scores.float() + (gate[:, :, rows] * position_bias[:, :, rows]).float()
            total += scores.softmax(-1).mean(1).sum(1)
        return total / tokens

    def _split(self, projected: Tensor) -> Float[Tensor, "batch heads tokens head"]:
        return projected.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _gate(self, query: Float[Tensor, "batch heads tokens head"]) -> Float[Tensor, "batch heads tokens 1"]:
        """What each query multiplies the position bias by."""
        first, second = self.grep_linear(query).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, -1)
        return first * (second * self.grep_a - 1) + 2

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        # in float32 as the original writes it: the decoder magnifies the other rounding of a fused kernel
        exact = query.dtype == torch.float32 or self.config._attn_implementation == "eager"
        if not exact:  # flash attention takes no bias
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias), None
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3) + bias
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        return weights @ value, weights


class BeatsLayer(nn.Module):
    """A post-norm layer whose residual is scaled (DeepNorm)."""

    def __init__(self, config: PreTrainedConfig, shape: BeatsShape) -> None:
        super().__init__()
        width = shape.encoder_embed_dim
        self.residual_scale = (2 * shape.encoder_layers) ** 0.25
        self.self_attn = BeatsAttention(config, shape)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, shape.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(shape.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, position_bias: Tensor) -> Tensor:
        """[batch, tokens, width], same out."""
        mixed, _ = self.self_attn(hidden, position_bias)
        hidden = self.self_attn_layer_norm(hidden * self.residual_scale + mixed)
        out = self.fc2(nn.functional.gelu(self.fc1(hidden)))
        return self.final_layer_norm(hidden * self.residual_scale + out)


class BeatsEncoder(nn.Module):
    """Positions by convolution, then the layers."""

    def __init__(self, config: PreTrainedConfig, shape: BeatsShape) -> None:
        super().__init__()
        width = shape.encoder_embed_dim
        self.pos_conv = nn.Sequential(PositionConv(width, shape.conv_pos, shape.conv_pos_groups))
        self.layers = nn.ModuleList(BeatsLayer(config, shape) for _ in range(shape.encoder_layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, width], same out."""
        hidden = self.layer_norm(hidden + self.pos_conv(hidden))
        bias = cast(BeatsLayer, self.layers[0]).self_attn.position_bias(hidden.shape[1], hidden.device)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        return hidden


class Beats(nn.Module):
    """The audio tower. `predictor` is part of the checkpoint but of no use here."""

    def __init__(self, config: PreTrainedConfig, shape: BeatsShape) -> None:
        super().__init__()
        patch = shape.input_patch_size
        self.post_extract_proj = nn.Linear(shape.embed_dim, shape.encoder_embed_dim)
        self.patch_embedding = nn.Conv2d(1, shape.embed_dim, patch, stride=patch, bias=False)
        self.encoder = BeatsEncoder(config, shape)
        self.layer_norm = nn.LayerNorm(shape.embed_dim)
        self.predictor = nn.Linear(shape.encoder_embed_dim, shape.predictor_class)

    def forward(self, fbank: Float[Tensor, "audios rows bins"]) -> Float[Tensor, "audios tokens width"]:
        """Tokens in the order time, frequency. Silent padding is encoded like any other sound, as in the original."""
        fbank = (fbank - FBANK_MEAN) / (2 * FBANK_STD)
        patches = self.patch_embedding(fbank[:, None]).flatten(2).transpose(1, 2)
        return self.encoder(self.post_extract_proj(self.layer_norm(patches)))
