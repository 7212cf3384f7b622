"""The Q-Former: a query that reads a window of sound, after BERT with cross-attention.

Parameters have the original's names. Of BERT there is only what the original uses: no words, no positions, and the
feed-forward of queries.

Source: arXiv:2301.12597, section 3.1; windows after arXiv:2310.13289, section 3.1.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

BERT_POSITIONS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class QFormerShape:
    """The dimensions of the Q-Former, which the original takes from `bert-base-uncased` or hard-wires."""

    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_hidden_layers: int = 2
    layer_norm_eps: float = 1e-12


class Attention(nn.Module):
    """Multi-head attention of queries [batch, queries, hidden] to `source` [batch, keys, channels]."""

    def __init__(self, shape: QFormerShape, channels: int) -> None:
        super().__init__()
        self.heads = shape.num_attention_heads
        self.query = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.key = nn.Linear(channels, shape.hidden_size)
        self.value = nn.Linear(channels, shape.hidden_size)

    def forward(self, hidden: Tensor, source: Tensor) -> Tensor:
        """[batch, queries, hidden]."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(hidden), self.key(source), self.value(source))
        )
        return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """A linear layer whose output is added to the shortcut; then a layer norm."""

    def __init__(self, channels: int, shape: QFormerShape) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)

    def forward(self, hidden: Tensor, shortcut: Tensor) -> Tensor:
        """[batch, queries, hidden]."""
        return self.LayerNorm(self.dense(hidden) + shortcut)


class AttentionBlock(nn.Module):
    """Attention with its residual."""

    def __init__(self, shape: QFormerShape, channels: int) -> None:
        super().__init__()
        self.self = Attention(shape, channels)
        self.output = Residual(shape.hidden_size, shape)

    def forward(self, hidden: Tensor, source: Tensor) -> Tensor:
        """[batch, queries, hidden]."""
        return self.output(self.self(hidden, source), hidden)


class Layer(nn.Module):
    """Self-attention among the queries, cross-attention to the sound, feed-forward."""

    def __init__(self, shape: QFormerShape, channels: int) -> None:
        super().__init__()
        self.attention = AttentionBlock(shape, shape.hidden_size)
        self.crossattention = AttentionBlock(shape, channels)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(shape.hidden_size, shape.intermediate_size)})
        self.output_query = Residual(shape.intermediate_size, shape)

    def forward(self, hidden: Tensor, sound: Tensor) -> Tensor:
        """[batch, queries, hidden]."""
        hidden = self.attention(hidden, hidden)
        hidden = self.crossattention(hidden, sound)
        inner = nn.functional.gelu(self.intermediate_query["dense"](hidden))
        return self.output_query(inner, hidden)


class Embeddings(nn.Module):
    """A layer norm of the queries. The position numbers are part of checkpoints but have no use."""

    position_ids: Tensor

    def __init__(self, shape: QFormerShape) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.register_buffer("position_ids", torch.arange(BERT_POSITIONS)[None])

    def forward(self, queries: Tensor) -> Tensor:
        """[batch, queries, hidden]."""
        return self.LayerNorm(queries)


class QFormer(nn.Module):
    """The layers, one after another. channels: of the sound."""

    def __init__(self, shape: QFormerShape, channels: int) -> None:
        super().__init__()
        layers = nn.ModuleList(Layer(shape, channels) for _ in range(shape.num_hidden_layers))
        encoder = nn.ModuleDict({"layer": layers})
        self.bert = nn.ModuleDict({"embeddings": Embeddings(shape), "encoder": encoder})

    def forward(
        self, queries: Float[Tensor, "1 queries hidden"], sound: Float[Tensor, "windows positions channels"]
    ) -> Float[Tensor, "windows queries hidden"]:
        """What the queries read in each window."""
        hidden = self.bert["embeddings"](queries).expand(len(sound), -1, -1)
        for layer in self.bert["encoder"].get_submodule("layer").children():
            hidden = layer(hidden, sound)
        return hidden
