"""Media among text: where placeholders are, and embeddings in their place."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fastav.errors import MediaError

HINT = "make the inputs with the model's processor, which expands each placeholder to one id per token"


def merged(
    table: nn.Module,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    features: Mapping[int, Tensor | None],
    *,
    whole: bool = True,
    blank: int | None = None,
) -> Float[Tensor, "batch prompt hidden"]:
    """Text embeddings with the rows of `features` in the places of their ids, in order.

    table: the embeddings of text. inputs_embeds: in place of ids: embeddings of which those of placeholders are the
    table's. features: [tokens, hidden] by placeholder id, None without such media. whole: whether the ids are a
    prompt's, so that each placeholder needs its media; later ids may be placeholders that were generated. blank: the id
    whose embedding is zero.

    Raises: MediaError unless there are either ids or embeddings, and as many places of each id as rows. That is on the
    CPU, where a look at the data costs nothing; other devices raise an assertion of their own, without a wait.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise MediaError("the model takes input_ids or inputs_embeds, one of them", "leave the other out")
    given = {token: rows for token, rows in features.items() if rows is not None}
    absent = features.keys() - given.keys() if whole else ()
    place = {token: places(table, input_ids, inputs_embeds, token) for token in given}
    text = input_ids
    if text is not None and input_ids is not None:
        for token in (*given, *absent, *([] if blank is None else [blank])):
            text = text.masked_fill(input_ids == token, 0)  # a placeholder need not be a row of the embedding
        for token in absent:
            _expect(input_ids == token, 0, token)
    hidden: Any = inputs_embeds if input_ids is None else table(text)
    if blank is not None:
        hidden = hidden.masked_fill(places(table, input_ids, hidden, blank)[..., None], 0)
    for token, rows in given.items():
        _expect(place[token], len(rows), token)
        hidden = hidden.masked_scatter(place[token][..., None], rows.to(hidden))
    return hidden


def encoded(hidden: Any, tokens: Any, **states: Any) -> BaseModelOutputWithPooling:
    """What `get_video_features` and `get_audio_features` return.

    hidden: the encoder's output, `last_hidden_state`. tokens: the decoder's input, `pooler_output`. states: the
    encoder's `hidden_states` and `attentions`.
    """
    return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=tokens, **states)


def places(
    table: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None, token: int
) -> Bool[Tensor, "batch prompt"]:
    """Where a placeholder is, by its id, or by its embedding where there are no ids."""
    if input_ids is not None:
        return input_ids == token
    assert inputs_embeds is not None
    weight: Any = table.weight
    if token >= len(weight):
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    one = torch.full((1,), token, dtype=torch.long, device=inputs_embeds.device)
    return (inputs_embeds == table(one).to(inputs_embeds)).all(-1)  # called, as its weights may be offloaded


def ids_of(table: nn.Module, inputs_embeds: Tensor, tokens: Sequence[int]) -> Tensor:
    """Ids [batch, prompt] of embeddings that are not merged yet: those of placeholders, 0 for anything else."""
    ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
    for token in tokens:
        ids = ids.masked_fill(places(table, None, inputs_embeds, token), token)
    return ids


def starts_prompt(cache: Any, input_ids: Tensor | None) -> bool:
    """Whether ids begin a prompt, so that a placeholder among them stands for media; it may be a generated id later."""
    return input_ids is not None and input_ids.shape[1] > 1 and (cache is None or not cache.get_seq_length())


def _expect(place: Tensor, tokens: int, token: int) -> None:
    if torch.compiler.is_compiling() or place.device.type == "meta":
        return
    if place.device.type != "cpu":
        message = f"placeholders of id {token} and their media differ in number, see fastav's MediaError"
        torch.ops.aten._assert_async.msg(place.sum() == tokens, message)
    elif (placeholders := int(place.sum())) != tokens:
        given = f"their media give {tokens} tokens" if tokens else "no media for them are given"
        raise MediaError(f"the prompts hold {placeholders} placeholders of id {token}, {given}", HINT)
