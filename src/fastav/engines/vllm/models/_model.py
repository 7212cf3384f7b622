"""A model for vLLM: our encoders, and vLLM's Qwen2 as the decoder."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastav.adapter import adapter_for
from fastav.engines.vllm.compat import SupportsMultiModal, init_vllm_registered_model, maybe_prefix
from fastav.engines.vllm.models._clips import CLIP_IDS, embedded_ids

Features = Mapping[str, Tensor]  # of one clip


def encoders(config: PreTrainedConfig) -> PreTrainedModel:
    """The adapter's model without its decoder; parameters have the checkpoint's names."""
    own: Any = deepcopy(config)
    own.num_hidden_layers, own.layer_types, own.vocab_size, own.pad_token_id = 0, [], 1, None
    model = adapter_for(config.architectures or ()).build(own)
    decoder = model.get_decoder()
    del decoder.embed_tokens, decoder.layers, decoder.norm, decoder.rotary_emb, model.lm_head
    return model.eval()


class ClipModel(nn.Module, SupportsMultiModal):
    """Base class of the families' models.  Subclasses implement `encode`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        model = vllm_config.model_config
        self.config, self.source = model.hf_config, model.model
        self.encoders = encoders(self.config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=self.config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["Qwen2ForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Nothing: `ClipRenderer` puts clips into prompts."""
        return None

    @abstractmethod
    def encode(self, features: Features) -> Mapping[int, Tensor]:
        """A clip's embeddings [tokens, hidden] by token id, in order; embeddings of other ids are zero."""

    def embed_multimodal(self, **batch: Any) -> list[Tensor]:
        """The embeddings [tokens, hidden] of each clip's tokens that are not text."""
        return [self._embed(features) for features in _items(batch)]

    def _embed(self, features: Features) -> Tensor:
        by_id, ids = self.encode(features), features[CLIP_IDS]  # the latter on the host, so that indexing does not wait
        ids = ids[torch.isin(ids, torch.tensor(embedded_ids(self.config.scheme)))]
        first = next(iter(by_id.values()))
        merged = first.new_zeros(len(ids), first.shape[1])
        for token_id, embeddings in by_id.items():
            indices = (ids == token_id).nonzero()[:, 0]
            merged.index_copy_(0, indices.to(merged.device, non_blocking=True), embeddings.to(merged))
        return merged

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Hidden states [tokens, hidden] of the decoder."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [tokens, vocab]."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint of the original; returns the names of the loaded parameters.

        Raises: CheckpointError as our own loading does; vLLM's errors for weights of the decoder.
        """
        own, shapes = self.encoders.state_dict(), dict[str, torch.Size]()
        decoder = self.language_model.load_weights(_load_own(own, weights, shapes))
        mismatched = [(name, shape, own[name].shape) for name, shape in shapes.items() if shape != own[name].shape]
        info = {"missing_keys": own.keys() - shapes.keys(), "unexpected_keys": set(), "mismatched_keys": mismatched}
        complete: Any = self.encoders
        complete._complete(info, self.source)
        return {f"language_model.{name}" for name in decoder} | {f"encoders.{name}" for name in own}


def _load_own(
    own: Mapping[str, Tensor], weights: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """Copy the encoders' weights and yield all others; adds the shapes of the former to `shapes`."""
    for name, weight in weights:
        if name not in own:
            yield name, weight
            continue
        shapes[name] = weight.shape
        if weight.shape == own[name].shape:
            own[name].copy_(weight)


def _items(batch: Mapping[str, Any]) -> Iterator[Features]:
    """Split a batch of vLLM, of tensors or, where sizes differ, lists, into the features of each clip."""
    for index in range(len(batch[CLIP_IDS])):
        yield {name: value[index] for name, value in batch.items()}
