"""The Q-Former: BERT layers in which a few queries read a window of sound. Parameters have the originals' names.

Of BERT there is only what the originals use: no words, no positions, and the feed-forward of queries.

Source: arXiv:2301.12597, section 3.1; windows after arXiv:2310.13289, section 3.1.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

Queries = Float[Tensor, "windows queries hidden"]


class ResidualNorm(nn.Module):
    """A linear layer whose output is added to the shortcut; then a layer norm.  shape: a family's `QFormerShape`."""

    def __init__(self, shape: Any, channels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)

    def forward(self, hidden: Float[Tensor, "windows queries channels"], shortcut: Queries) -> Queries:
        """The sum, normalized."""
        return self.LayerNorm(self.dense(hidden) + shortcut)


class Attention(nn.Module):
    """Multi-head attention of queries to themselves or to a window of `channels` channels, with its residual."""

    def __init__(self, shape: Any, channels: int) -> None:
        super().__init__()
        self.heads, hidden = shape.num_attention_heads, shape.hidden_size
        widths = {"query": hidden, "key": channels, "value": channels}
        self.self = nn.ModuleDict({name: nn.Linear(width, hidden) for name, width in widths.items()})
        self.output = ResidualNorm(shape, hidden)

    def forward(self, queries: Queries, source: Float[Tensor, "windows frames channels"]) -> Queries:
        """Queries that have attended to the source."""
        query, key, value = (
            self.self[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, x in (("query", queries), ("key", source), ("value", source))
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).flatten(2), queries)


class Layer(nn.Module):
    """Self-attention, cross-attention to the window if `crosses`, and a feed-forward."""

    def __init__(self, shape: Any, channels: int, activation: str, *, crosses: bool) -> None:
        super().__init__()
        self.attention = Attention(shape, shape.hidden_size)
        self.crossattention = Attention(shape, channels) if crosses else None
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(shape.hidden_size, shape.intermediate_size)})
        self.output_query = ResidualNorm(shape, shape.intermediate_size)
        self.activation = ACT2FN[activation]

    def forward(self, queries: Queries, window: Float[Tensor, "windows frames channels"]) -> Queries:
        """Queries that have read the window."""
        queries = self.attention(queries, queries)
        if self.crossattention is not None:
            queries = self.crossattention(queries, window)
        return self.output_query(self.activation(self.intermediate_query["dense"](queries)), queries)


class Embeddings(nn.Module):
    """The layer norm of the queries, and `positions` position numbers that checkpoints hold and nothing reads."""

    position_ids: Tensor

    def __init__(self, shape: Any, positions: int) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        if positions:
            self.register_buffer("position_ids", torch.arange(positions)[None])


class QFormer(nn.Module):
    """The layers, one after another.

    channels: of the sound. activation: of the feed-forward. cross_every: every such layer reads the window, the first
    one among them. positions: see `Embeddings`.
    """

    def __init__(
        self, shape: Any, channels: int, *, activation: str = "gelu", cross_every: int = 1, positions: int = 0
    ) -> None:
        super().__init__()
        layers = nn.ModuleList(
            Layer(shape, channels, activation, crosses=index % cross_every == 0)
            for index in range(shape.num_hidden_layers)
        )
        encoder = nn.ModuleDict({"layer": layers})
        self.bert = nn.ModuleDict({"embeddings": Embeddings(shape, positions), "encoder": encoder})

    def forward(
        self, queries: Float[Tensor, "1 queries hidden"], windows: Float[Tensor, "windows frames channels"]
    ) -> Queries:
        """What the queries read in each window.  queries: before the first norm."""
        bert: Any = self.bert
        queries = bert["embeddings"].LayerNorm(queries).expand(len(windows), -1, -1)
        for layer in bert["encoder"]["layer"]:
            queries = layer(queries, windows)
        return queries
