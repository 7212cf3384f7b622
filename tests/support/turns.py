"""Conversations on the tiny decoder, and any plan as the oracle's rules: a method scores what a dense run computed."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2ForCausalLM

from fastav.cache_argument import as_argument
from fastav.engines.transformers import Pruning
from fastav.layout import Layout
from fastav.method import Method, Signal, View, method_of
from fastav.plan import Plan
from fastav.pruning.device_layout import batch_layout
from fastav.pruning.state import WINDOW
from support.oracle import Evidence, Turn, TurnRule, conversation_logits
from support.tiny import AUDIO_ID, VIDEO_ID, layout_of, pad_left, waves


def turn_under(plan: Plan, ids: Tensor, start: int, depth: int, given: Tensor | None = None) -> Turn:
    """A turn's prompt [tokens], which begins at `start`, under a plan.  given: scores for the method `given`."""
    layout = layout_of(ids)
    rules: dict[int, TurnRule] = {}
    for (layer, step), cut in zip(plan.cuts(depth), plan.schedule(layout, depth), strict=True):
        rule = _rule(method_of(step), cut.counts, layout, ids, start, layer, given)
        rules[layer] = _then(rules[layer], rule) if layer in rules else rule
    cache_rules = {
        layer: _rule(method_of(step), cut.counts, layout, ids, start, layer, given)
        for (layer, step), cut in zip(plan.cache_cuts(depth), plan.cache_schedule(layout, depth), strict=True)
    }
    until = plan.earlier_caches_until(depth)
    return Turn(start=start, end=start + len(ids), rules=rules, cache_rules=cache_rules, until=until)


def _then(first: TurnRule, second: TurnRule) -> TurnRule:
    return lambda seen, hide: second(seen, first(seen, hide))


def _rule(
    method: Method,
    counts: Mapping[Any, int],
    layout: Layout,
    ids: Tensor,
    start: int,
    layer: int,
    given: Tensor | None,
) -> TurnRule:
    """Of each pool the best stay, of equals the earlier; the last token stays; what merges changes hidden states."""
    batch, n = batch_layout([layout], len(layout), torch.device("cpu")), len(layout)

    budgets = torch.full((n + 1,), len(counts))
    for number, pool in enumerate(counts):
        budgets[:n][torch.from_numpy(np.isin(layout.modality, list(pool)))] = number

    def rule(seen: Evidence, hide: Tensor) -> Tensor:
        left = (~hide).nonzero()[:, 0]
        signals = {name: read(seen, start, start + n) for name, read in _SIGNALS.items() if name in method.needs}
        last = max((i for i in range(n) if ids[i] >= AUDIO_ID), default=-1)
        question = slice(start + min(last + 1, n - 1), start + n)
        for name, read_map in _QUESTIONS.items():
            if name in method.needs:
                signals[name] = read_map(seen)[question, start : start + n].mean(0)
        for signal, token in ((Signal.AUDIO_ENCODER, AUDIO_ID), (Signal.VISION_ENCODER, VIDEO_ID)):
            if signal in method.needs | method.wants:
                signals[signal] = torch.zeros(n)
                signals[signal][ids == token] = waves(torch.arange(1.0, 1 + int((ids == token).sum())))
        if given is not None:
            signals[Signal.GIVEN] = given
        here = {name: value[left][None] for name, value in signals.items()}
        here[Signal.HIDDEN_STATES] = seen.hidden[start : start + n][left][None]
        if seen.keys is not None:
            here[Signal.KEYS] = seen.keys[:, start : start + n][:, left][None]
        view = View(
            layer=layer,
            layout=batch,
            slots=left[None],
            pool=budgets[None],
            signals=here,
            method=type(method).__name__,
            needs=method.needs,
            wants=method.wants,
        )
        score = method.score(view)[0]
        kept = set(left.tolist())
        for pool, count in counts.items():
            members = [i for i, slot in enumerate(left.tolist()) if layout.modality[slot] in pool]
            best = sorted(members, key=lambda i: (left[i] == n - 1, float(score[i]), -i), reverse=True)
            kept -= {int(left[i]) for i in best[count:]}
        if method.merges:
            indices = torch.tensor([[i for i, slot in enumerate(left.tolist()) if slot in kept]])
            merged = method.merge(view, indices, torch.ones_like(indices, dtype=torch.bool))[0]
            seen.hidden = seen.hidden.clone()
            seen.hidden[start + left[indices[0]]] = merged
        return torch.tensor([i not in kept for i in range(n)])

    return rule


def _last_query(seen: Evidence, start: int, end: int) -> Tensor:
    return seen.maps[-1][end - 1, start:end]


def _window(seen: Evidence, start: int, end: int) -> Tensor:
    queries = [i for i in range(start, end) if not seen.gone[-1][i]][-WINDOW:]
    return seen.maps[-1][queries, start:end].mean(0)


def _rollout(seen: Evidence, start: int, end: int) -> Tensor:
    """The last query's row of the rollout of the whole conversation, at this turn's tokens."""
    itself = torch.eye(seen.maps[0].shape[0])
    total = itself
    for attention, gone in zip(seen.maps, seen.gone, strict=True):
        layer = torch.where(gone[:, None], itself, 0.5 * attention + 0.5 * itself)
        total = layer @ total
    return total[end - 1, start:end]


def _own_last_query(seen: Evidence, start: int, end: int) -> Tensor:
    return _own(seen)[end - 1, start:end]


def _own(seen: Evidence) -> Tensor:
    assert seen.own is not None
    return seen.own


_QUESTIONS: dict[Signal, Callable[[Evidence], Tensor]] = {
    Signal.TEXT_QUERIES: lambda seen: seen.maps[-1],
    Signal.OWN_TEXT_QUERIES: _own,
}
_SIGNALS: dict[Signal, Callable[[Evidence, int, int], Tensor]] = {
    Signal.LAST_QUERY: _last_query,
    Signal.OWN_LAST_QUERY: _own_last_query,
    Signal.WINDOW: _window,
    Signal.ROLLOUT: _rollout,
}


@dataclass
class Conversation:
    """What was said in each row, and what the model said to it.

    ids: the tokens of each row, without padding. turns: (start, end) of every prompt in each row. logits: of each row,
    those that lead to every answered token, and their places in `ids`.
    """

    ids: list[Tensor]
    turns: list[list[tuple[int, int]]]
    logits: list[list[tuple[int, Tensor]]]


@torch.no_grad()
def converse(
    model: Any,
    pruning: Pruning | None,
    prompts: Sequence[Sequence[Tensor]],
    answers: Sequence[Sequence[int]],
    *,
    cache: Any = None,
    read: bool = False,
    scores: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> Conversation:
    """Prompts [1, tokens] by turn and row, each answered greedily by so many tokens, over one cache.

    Rows of one turn are padded on the left, and answers that are shorter than others at the right. Turns without media
    are plain forwards, as they always were. pruning: None to run unpruned. read: whether turns read their layouts from
    the ids. scores: by turn. options: of every forward of a prompt.
    """
    rows, cache = range(len(prompts[0])), DynamicCache(config=model.config) if cache is None else cache
    said = Conversation([torch.zeros(0, dtype=torch.long) for _ in rows], [[] for _ in rows], [[] for _ in rows])
    mask = torch.zeros(len(rows), 0, dtype=torch.long)

    def forward(ids: Tensor, real: Tensor, **options: Any) -> Tensor:
        nonlocal mask
        mask = torch.cat([mask, real], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(ids, attention_mask=mask, position_ids=positions, **as_argument(cache), **options).logits
        for row in rows:
            said.ids[row] = torch.cat([said.ids[row], ids[row][real[row].bool()]])
        return out[:, -1]

    for number, (turn, lengths) in enumerate(zip(prompts, answers, strict=True)):
        padded = pad_left(turn)
        for row in rows:
            start = len(said.ids[row])
            said.turns[row].append((start, start + turn[row].shape[1]))
        layouts = None if read else [layout_of(ids[0]) for ids in turn]
        is_text = number > 0 and not any(bool((ids >= AUDIO_ID).any()) for ids in turn)
        given = None if scores is None else scores[number]
        with nullcontext() if is_text or pruning is None else pruning.turn(layouts, scores=given):
            last = forward(padded["input_ids"], padded["attention_mask"], **options)
        for step in range(max(lengths)):
            going = torch.tensor([[step < length] for length in lengths])
            for row in rows:
                if going[row]:
                    said.logits[row].append((len(said.ids[row]) - 1, last[row]))
            last = forward(torch.where(going, last.argmax(1, keepdim=True), 0), going.long())
    return said


def expected(
    model: Qwen2ForCausalLM, said: Conversation, row: int, plan: Plan, scores: Sequence[Tensor | None] | None = None
) -> Tensor:
    """The oracle's logits of one row of a conversation."""
    ids, depth = said.ids[row], model.config.num_hidden_layers
    turns = [
        turn_under(plan, ids[start:end], start, depth, None if scores is None else scores[number])
        for number, (start, end) in enumerate(said.turns[row])
    ]
    with torch.no_grad():
        return conversation_logits(model, ids[None], turns)
