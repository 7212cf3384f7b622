"""A model of vLLM's: encoders of ours, and its Qwen2."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from vllm.model_executor.models.interfaces import SupportsMultiModal  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.utils import (  # pyright: ignore[reportMissingImports]
    init_vllm_registered_model,
    maybe_prefix,
)

from fastav.adapter import adapter_for
from fastav.engines.vllm.families._clips import RUN, embedded

Item = Mapping[str, Tensor]


def encoders(config: PreTrainedConfig) -> PreTrainedModel:
    """The adapter's model without anything of its decoder, under the checkpoint's names."""
    own: Any = deepcopy(config)
    own.num_hidden_layers, own.layer_types, own.vocab_size, own.pad_token_id = 0, [], 1, None
    model = adapter_for(config.architectures or ()).build(own)
    decoder = model.get_decoder()
    del decoder.embed_tokens, decoder.layers, decoder.norm, decoder.rotary_emb, model.lm_head
    return model.eval()


class ClipModel(nn.Module, SupportsMultiModal):
    """What the families share."""

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
        """None: `ClipRenderer` puts clips into prompts."""
        return None

    @abstractmethod
    def encode(self, item: Item) -> Mapping[int, Tensor]:
        """Of a clip, by id: the embeddings [tokens, hidden] of the places that hold it, in order.  Others are zero."""

    def embed_multimodal(self, **given: Any) -> list[Tensor]:
        """The embeddings of each clip: of its run's ids that are not text."""
        return [self._embedded(item) for item in _items(given)]

    def _embedded(self, item: Item) -> Tensor:
        found, run = self.encode(item), item[RUN]  # the latter on the host, where looking costs nothing
        run = run[torch.isin(run, torch.tensor(embedded(self.config.scheme)))]
        features = next(iter(found.values()))
        merged = features.new_zeros(len(run), features.shape[1])
        for token, rows in found.items():
            place = (run == token).nonzero()[:, 0]
            merged.index_copy_(0, place.to(merged.device, non_blocking=True), rows.to(merged))
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
        """Load a checkpoint of the original; the names of all that has its values now.

        Raises: CheckpointError as our own loading does; vLLM's errors for what is the decoder's.
        """
        own, given = self.encoders.state_dict(), dict[str, torch.Size]()
        decoder = self.language_model.load_weights(_taken(own, weights, given))
        other = [(name, shape, own[name].shape) for name, shape in given.items() if shape != own[name].shape]
        info = {"missing_keys": own.keys() - given.keys(), "unexpected_keys": set(), "mismatched_keys": other}
        complete: Any = self.encoders
        complete._complete(info, self.source)
        return {f"language_model.{name}" for name in decoder} | {f"encoders.{name}" for name in own}


def _taken(
    own: Mapping[str, Tensor], weights: Iterable[tuple[str, Tensor]], given: dict[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """The weights that are not the encoders', whose own are copied; `given` then holds the shapes of those."""
    for name, weight in weights:
        if name not in own:
            yield name, weight
            continue
        given[name] = weight.shape
        if weight.shape == own[name].shape:
            own[name].copy_(weight)


def _items(given: Mapping[str, Any]) -> Iterator[Item]:
    """One item at a time of what vLLM batches: tensors, or lists where sizes differ."""
    for at in range(len(given[RUN])):
        yield {name: value[at] for name, value in given.items()}
