"""The definition of pruning for any model of transformers: every decoder layer hides what was dropped by its mask.

The model runs by its own code, densely, without a cache, with eager attention, over prompt and answer at once, one
unpadded row at a time. Nothing is removed; before each attention call the mask gets columns that are hidden, and scores
are read off the attention weights that the call returns. For scores of a layer about to run, its attention is called
twice. Layers that share keys and values of an earlier layer see what that one shows.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from fastav.cache_argument import as_argument
from fastav.layout import Layout
from fastav.plan import Plan
from support.oracle import OwnRule, Rule


def masked_logits(
    model: PreTrainedModel,
    layers: Sequence[Any],
    inputs: Mapping[str, Any],
    answer: Tensor,
    rules: Mapping[int, Rule],
    *,
    until: int = 0,
) -> Tensor:
    """Logits [answer, vocab] that lead to each token of an answer [answer] to one prompt.

    inputs: arguments of `forward` for the prompt, a batch of one. until: layers before this one hide from the answer
    what this one hides.
    """
    prompt, new = inputs["input_ids"].shape[1], len(answer) - 1
    whole = dict(inputs)
    whole["input_ids"] = torch.cat([inputs["input_ids"], answer[None, :-1]], dim=1)
    for name, value in inputs.items():
        if name != "input_ids" and isinstance(value, Tensor) and tuple(value.shape) == (1, prompt):
            filler = torch.full((1, new), int(name == "attention_mask"), dtype=value.dtype)
            whole[name] = torch.cat([value, filler], dim=1)
    turns = [(0, prompt, rules)]
    late = _run(model, layers, whole, _Hidden(turns))[0].at[until] if until else torch.zeros(prompt, dtype=torch.bool)
    return _run(model, layers, whole, _Hidden(turns, until, late))[1][prompt - 1 :]


def masked_conversation(
    model: PreTrainedModel,
    layers: Sequence[Any],
    inputs: Mapping[str, Any],
    turns: Sequence[tuple[int, int, Mapping[int, Rule]]],
) -> Tensor:
    """Logits [tokens, vocab] of a whole conversation, and what each turn hides: of its tokens, start to before end.

    inputs: arguments of `forward` for all tokens, a batch of one.
    """
    return _run(model, layers, inputs, _Hidden(turns))[1]


def _run(
    model: PreTrainedModel, layers: Sequence[Any], inputs: Mapping[str, Any], hidden: "_Hidden"
) -> tuple["_Hidden", Tensor]:
    """What every layer hid, and the logits."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with ExitStack() as stack, torch.no_grad():
            for index, layer in enumerate(layers):
                attention = layer.self_attn
                handles = (
                    attention.register_forward_pre_hook(hidden.mask(index, _source(layers, index)), with_kwargs=True),
                    attention.register_forward_hook(hidden.score),
                )
                for handle in handles:
                    stack.callback(handle.remove)
            return hidden, model(**inputs, use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(before)


def masked_steps(
    model: PreTrainedModel, layers: Sequence[Any], steps: Sequence[tuple[Tensor, Mapping[int, Rule] | None]], cache: Any
) -> list[Tensor]:
    """Logits [tokens, vocab] of forwards over one cache, which holds all tokens: what is dropped is hidden by masks.

    The model uses eager attention. steps: ids [1, tokens] of each forward, and the rules of the turn that it begins.
    """
    hidden, logits, length = _HiddenInCache(), [], 0
    with ExitStack() as stack, torch.no_grad():
        for index, layer in enumerate(layers):
            stack.callback(layer.self_attn.register_forward_pre_hook(hidden.mask(index), with_kwargs=True).remove)
            stack.callback(layer.self_attn.register_forward_hook(hidden.score).remove)
        for ids, rules in steps:
            hidden.begin(ids.shape[1], rules or {})
            length += ids.shape[1]
            mask = torch.ones(1, length, dtype=torch.long)
            logits.append(model(ids, attention_mask=mask, **as_argument(cache)).logits[0])
    return logits


def rules_of(plan: Plan, layout: Layout, depth: int) -> dict[int, Rule]:
    """A plan for one prompt, as rules by layer: of each pool the best stay, as many as the plan's arithmetic says."""
    rules: dict[int, Rule] = {}
    steps = zip(plan.cuts(depth), plan.schedule(layout, depth), strict=True)
    for (layer, step), cut in steps:
        pools = [(np.isin(layout.modality, list(pool)), count) for pool, count in cut.counts.items()]
        rules[layer] = _both(rules.get(layer), _keep_best(step.method, pools, layout))
    return rules


def _both(first: Rule | None, second: Rule) -> Rule:
    if first is None:
        return second
    kind = OwnRule if OwnRule in (type(first), type(second)) else lambda rule: rule
    return kind(lambda score, hide: second(score, first(score, hide)))


def _keep_best(method: str, pools: Sequence[tuple[np.ndarray, int]], layout: Layout) -> Rule:
    def rule(score: Tensor | None, hide: Tensor) -> Tensor:
        for member, count in pools:
            left = [i for i in range(len(hide)) if member[i] and not hide[i]]
            value = {
                "position": _earliness(left, layout).__getitem__,
                "unpadded": lambda i: -int(layout.padding[i]),
            }.get(method)
            if method in ("last-query", "own-last-query"):
                assert score is not None
                value = score.tolist().__getitem__
            assert value is not None, method
            last = len(hide) - 1  # the prompt's last token always stays
            best = sorted(left, key=lambda i: (i == last, value(i), -i), reverse=True)[:count]
            hide[[i for i in left if i not in set(best)]] = True
        return hide

    return OwnRule(rule) if method == "own-last-query" else rule


def _earliness(left: Sequence[int], layout: Layout) -> dict[int, float]:
    """Minus the share of a clip's tokens that come before each token; a text goes with the clip before it."""
    groups: dict[int, list[int]] = {}
    for token in left:
        earlier = [item for item in layout.item[: token + 1] if item >= 0]
        groups.setdefault(max(earlier, default=0), []).append(token)
    return {token: -number / len(group) for group in groups.values() for number, token in enumerate(group)}


def _source(layers: Sequence[Any], index: int) -> int:
    """The layer whose keys and values a layer reads: its own, or an earlier one's."""
    attention = layers[index].self_attn
    if not getattr(attention, "is_kv_shared_layer", False):
        return index
    kind = attention.layer_type if hasattr(attention, "layer_type") else attention.config.layer_types[index]
    own = [i for i, layer in enumerate(layers) if not layer.self_attn.is_kv_shared_layer]
    return max(i for i in own if attention.config.layer_types[i] == kind)


class _Hidden:
    """What every layer hides, while the model runs from the first to the last.

    until, late: layers before this one hide the tokens `late` from all that follow the prompt.
    """

    def __init__(
        self, turns: Sequence[tuple[int, int, Mapping[int, Rule]]], until: int = 0, late: Tensor | None = None
    ) -> None:
        self.turns, self.until, self.late = turns, until, late
        self.attention: Tensor | None = None  # of the layer before, mean over heads
        self.hide = torch.zeros(max(end for _, end, _ in turns), dtype=torch.bool)
        self.at: dict[int, Tensor] = {}

    def mask(self, index: int, source: int) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            self.hide, given = self.hide.clone(), kwargs.get("attention_mask")
            assert given is not None, "eager attention is given a mask"
            for start, end, rules in self.turns:
                if index in rules:
                    attention = self.attention
                    if isinstance(rules[index], OwnRule):
                        own = kwargs | {"attention_mask": self.masked(given, self.hide, source)}
                        attention = type(module).forward(module, *args, **own)[1][0].mean(0)
                    score = None if attention is None else attention[end - 1, start:end]
                    self.hide[start:end] = rules[index](score, self.hide[start:end].clone())
            self.at[index] = self.hide
            kwargs["attention_mask"] = self.masked(given, self.at[source], source)
            return args, kwargs

        return before

    def masked(self, given: Tensor, hide: Tensor, source: int) -> Tensor:
        """A layer's mask that hides these tokens.  source: the layer whose keys it reads."""
        gone = torch.zeros(given.shape[-1], dtype=torch.bool)
        gone[: len(hide)] = hide
        # a dropped token still sees itself, so that its own row is a number; nobody reads it
        unseen = gone[None] & ~torch.eye(len(gone), dtype=torch.bool)
        if source < self.until and self.late is not None:
            unseen[len(self.late) :, : len(self.late)] |= self.late
        return given.masked_fill(unseen, torch.finfo(given.dtype).min)

    def score(self, module: Any, args: Any, output: Any) -> None:
        self.attention = output[1][0].mean(0)


def _apart(value: Any) -> Any:
    """A cache with layers of its own, whose tensors are replaced, not changed; anything else as it is."""
    if isinstance(value, Cache):
        value = copy(value)
        value.layers = [copy(layer) for layer in value.layers]
    return value


class _HiddenInCache:
    """What every layer hides of the tokens so far, forward by forward."""

    def __init__(self) -> None:
        self.at: dict[int, Tensor] = {}

    def begin(self, new: int, rules: Mapping[int, Rule]) -> None:
        self.hide, self.rules = torch.zeros(new, dtype=torch.bool), rules
        self.latest: Tensor | None = None

    def mask(self, index: int) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            given, earlier = kwargs["attention_mask"], self.at.get(index, self.hide[:0])
            if index in self.rules:
                if isinstance(self.rules[index], OwnRule):
                    own = {name: _apart(value) for name, value in kwargs.items()}
                    own["attention_mask"] = self.masked(given, earlier)
                    self.score(module, args, type(module).forward(module, *args, **own))
                self.hide = self.rules[index](self.latest, self.hide.clone())
            kwargs["attention_mask"] = self.masked(given, earlier)
            self.at[index] = torch.cat([earlier, self.hide])
            return args, kwargs

        return before

    def masked(self, given: Tensor, earlier: Tensor) -> Tensor:
        """A mask that hides tokens of this forward and earlier ones."""
        gone = torch.cat([earlier, self.hide])
        itself = torch.cat([torch.zeros(len(self.hide), len(earlier)), torch.eye(len(self.hide))], dim=1).bool()
        return given.masked_fill(gone[None] & ~itself, torch.finfo(given.dtype).min)

    def score(self, module: Any, args: Any, output: Any) -> None:
        self.latest = output[1][0, :, -1, -len(self.hide) :].mean(0)
