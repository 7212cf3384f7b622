"""The attention in SigLIP, for our own families."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastav.adapter import EncoderAttention, EncoderCall, ModelAdapter
from fastav.layout import Modality
from fastav.models._encoder_attention import received_attention


class SiglipAttention(EncoderAttention):
    """The attention in the last layer of SigLIP that runs: all patches of a frame attend to each other.

    Later layers, whose output the model does not use, do not run.
    """

    modalities = (Modality.VIDEO,)

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter

    def modules(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        """SigLIP, and the attention of its last layer that runs."""
        tower: Any = self.adapter.encoders(model)[0]
        return tower, tower.layers[-1].self_attn

    @abstractmethod
    def pool(self, patches: Float[Tensor, "frames patches"], call: EncoderCall) -> Float[Tensor, "..."]:
        """The attention of tokens in their order, from that of patches in row-major order."""

    def scores(
        self, attention: nn.Module, call: EncoderCall, attention_inputs: Mapping[str, Any]
    ) -> Float[Tensor, " tokens"]:
        """The attention that each video token receives: the mean over heads and the patches of its frame, pooled."""
        module: Any = attention
        hidden = attention_inputs["hidden_states"]
        query, key = (
            project(hidden).unflatten(2, (module.num_heads, -1)).transpose(1, 2)
            for project in (module.q_proj, module.k_proj)
        )
        return self.pool(received_attention(query, key, module.scale), call).flatten()
