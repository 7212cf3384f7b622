"""What our own models share around their decoders: encoding, the head, positions under a mask, and generation."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from fastav.cache_argument import as_argument, of_output
from fastav.models._checkpoint import StrictLoading
from fastav.models._merging import ids_of, starts_prompt


class MediaDecoder(StrictLoading):
    """Mixin of a decoder with encoders; it stands before transformers' decoder.

    A model defines `embed`, and a `forward` with one argument for each of its media, which calls `_forward_merged`.
    """

    def _forward_merged(
        self,
        media: Mapping[str, Tensor | None],
        *,
        input_ids: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: Any,
        inputs_embeds: Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Encode media, merge them into the embeddings of text, and run transformers' decoder on the result.

        media: for `embed`. input_ids: [batch, prompt], one placeholder id per media token. inputs_embeds: in their
        place; without media, they are merged already. position_ids: counted from each row's first unmasked token,
        unless given. kwargs: for the decoder.
        """
        model: Any = self
        if inputs_embeds is None or input_ids is not None or any(value is not None for value in media.values()):
            whole = starts_prompt(cache, input_ids)
            inputs_embeds = model.embed(input_ids, **media, inputs_embeds=inputs_embeds, whole=whole)
        embeds: Any = inputs_embeds
        if position_ids is None and isinstance(attention_mask, Tensor):
            position_ids = positions(attention_mask, embeds.shape[1])
        decoder: Any = super()
        return decoder.forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            **as_argument(cache),
            inputs_embeds=embeds,
            **kwargs,
        )


class MediaGeneration:
    """Mixin of a generating model with an `lm_head`; it stands before transformers' GenerationMixin.

    A model declares `media_inputs`, the arguments of `forward` that hold media, and defines
    `_media_per_row(name, media, input_ids)`: how many of the first axis of `media[name]` belong to each row.
    """

    media_inputs: ClassVar[tuple[str, ...]]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own declaration)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers' own; media are encoded in the first step only, unless there is no cache."""
        mixin: Any = super()
        inputs = mixin.prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        if use_cache and not is_first_iteration:
            for name in self.media_inputs:
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each prompt's media with the prompt; a row may have any number of them."""
        media = {name: kwargs.pop(name) for name in self.media_inputs if kwargs.get(name) is not None}
        embeds, places = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        by_axis = places is not None and places.ndim == 3  # M-RoPE: the batch is the second axis
        if by_axis:
            del kwargs["position_ids"]
        mixin: Any = super()
        expanded, kwargs = mixin._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if places is not None and by_axis:
            kwargs["position_ids"] = places.repeat_interleave(expand_size, dim=1)
        if expand_size > 1 and media:
            media = self._repeat_media(media, self._placeholders(input_ids, embeds), expand_size)
        return expanded, kwargs | media

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The prompts' ids; where only embeddings are given, those of placeholders, 0 elsewhere."""
        if input_ids is not None and input_ids.shape[1]:
            return input_ids
        model: Any = self
        assert inputs_embeds is not None
        tokens = [getattr(model.config, name) for name in model.config.placeholder_names]
        return ids_of(model.get_input_embeddings(), inputs_embeds, tokens)

    def _repeat_media(self, media: Mapping[str, Tensor], input_ids: Tensor, times: int) -> dict[str, Tensor]:
        """The media of prompts [batch, prompt] that are each repeated so many times."""
        model: Any = self
        return {
            name: repeat_groups(value, model._media_per_row(name, media, input_ids), times)
            for name, value in media.items()
        }

    def _with_head(
        self, outputs: Any, labels: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """The decoder's outputs, with logits [batch, kept, vocab] and, if there are labels, the loss."""
        model: Any = self
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = model.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            vocab = model.config.get_text_config(decoder=True).vocab_size
            loss = model.loss_function(logits=logits, labels=labels, vocab_size=vocab, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **as_argument(of_output(outputs)),
        )


class NativeGeneration(StrictLoading, MediaGeneration):
    """Mixin of a generating model whose `model` is a `MediaDecoder`; it stands before transformers' GenerationMixin."""

    def get_video_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling | tuple:
        """As the decoder's."""
        model: Any = self
        return model.model.get_video_features(*args, **kwargs)

    def _get_logits_processor(
        self, *args: Any, input_ids_seq_length: int | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        """As transformers' own; a repetition penalty sees generated tokens only.

        The originals generate from embeddings, so that theirs knows no prompt.
        """
        mixin: Any = super()
        processors = mixin._get_logits_processor(*args, input_ids_seq_length=input_ids_seq_length, **kwargs)
        for processor in processors:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor) and processor.prompt_ignore_length is None:
                processor.prompt_ignore_length = input_ids_seq_length
        return processors


def repeat_groups(value: Tensor, sizes: Sequence[int], times: int) -> Tensor:
    """Split the first axis into groups of these sizes, and repeat each group in place."""
    return torch.cat([group for group in value.split(list(sizes)) for _ in range(times)])


def positions(attention_mask: Tensor, last: int) -> Tensor | None:
    """Position ids [batch, last] of the last tokens under a mask [batch, prompt]; None for masks of another form."""
    if attention_mask.ndim != 2:
        return None
    counted = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
    return counted[:, -last:]
