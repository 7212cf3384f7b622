"""The Q-Former: BERT layers in which a few queries read a window of speech features. Names are the original's."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fastav.models.video_salmonn2_plus.configuration import QFormerShape

Queries = Float[Tensor, "windows queries hidden"]


class Attention(nn.Module):
    """Multi-head attention from queries to themselves or to a window, then a residual norm."""

    def __init__(self, shape: QFormerShape, width: int) -> None:
        super().__init__()
        self.heads = shape.num_attention_heads
        hidden = shape.hidden_size
        projections = {"query": nn.Linear(hidden, hidden)}
        projections |= {name: nn.Linear(width, hidden) for name in ("key", "value")}
        self.self = nn.ModuleDict(projections)
        self.output = ResidualNorm(shape, hidden)

    def forward(self, queries: Queries, seen: Float[Tensor, "windows seen width"]) -> Queries:
        """queries attend to `seen`."""
        heads = [
            self.self[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, x in (("query", queries), ("key", seen), ("value", seen))
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return self.output(mixed.transpose(1, 2).flatten(2), queries)


class ResidualNorm(nn.Module):
    """A projection, added to what came before, then normalized."""

    def __init__(self, shape: QFormerShape, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)

    def forward(self, new: Float[Tensor, "windows queries width"], before: Queries) -> Queries:
        """The sum, normalized."""
        return self.LayerNorm(self.dense(new) + before)


class Layer(nn.Module):
    """Self-attention, cross-attention to the window (in every `cross_attention_freq`-th layer), and an MLP."""

    def __init__(self, shape: QFormerShape, index: int) -> None:
        super().__init__()
        self.attention = Attention(shape, shape.hidden_size)
        if index % shape.cross_attention_freq == 0:
            self.crossattention = Attention(shape, shape.encoder_width)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(shape.hidden_size, shape.intermediate_size)})
        self.output_query = ResidualNorm(shape, shape.intermediate_size)
        self.activation = ACT2FN[shape.hidden_act]

    def forward(self, queries: Queries, window: Float[Tensor, "windows frames width"]) -> Queries:
        """queries, having read the window."""
        queries = self.attention(queries, queries)
        if hasattr(self, "crossattention"):
            queries = self.crossattention(queries, window)
        return self.output_query(self.activation(self.intermediate_query["dense"](queries)), queries)


class QFormer(nn.Module):
    """All layers. Queries come from outside."""

    def __init__(self, shape: QFormerShape) -> None:
        super().__init__()
        norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        layers = nn.ModuleList([Layer(shape, index) for index in range(shape.num_hidden_layers)])
        embeddings = nn.ModuleDict({"LayerNorm": norm})
        encoder = nn.ModuleDict({"layer": layers})
        self.bert = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder})

    def forward(self, queries: Queries, window: Float[Tensor, "windows frames width"]) -> Queries:
        """queries: before the first norm. window: what they read."""
        bert: Any = self.bert
        queries = bert["embeddings"]["LayerNorm"](queries)
        for layer in bert["encoder"]["layer"]:
            queries = layer(queries, window)
        return queries


def windows(speech: Float[Tensor, "pieces frames width"], size: int) -> Float[Tensor, "windows size width"]:
    """The frames of each piece in windows that follow one another; frames that fill none are left out."""
    pieces, frames, width = speech.shape
    whole = speech[:, : frames // size * size]
    return torch.reshape(whole, (pieces * (frames // size), size, width))
