"""The definition of pruning for any model of transformers: every decoder layer hides what was dropped by its mask.

The model runs by its own code, densely, without a cache, with eager attention, over prompt and answer at once, one
unpadded row at a time. Nothing is removed; before each attention call the mask gets columns that are hidden, and scores
are read off the attention weights that the call returns. Layers that share keys and values of an earlier layer see what
that one shows.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastav.layout import Layout
from fastav.plan import Plan
from support.oracle import Rule


def masked_logits(
    model: PreTrainedModel, layers: Sequence[Any], inputs: Mapping[str, Any], answer: Tensor, rules: Mapping[int, Rule]
) -> Tensor:
    """Logits [answer, vocab] that lead to each token of an answer [answer] to one prompt.

    inputs: arguments of `forward` for the prompt, a batch of one.
    """
    prompt, new = inputs["input_ids"].shape[1], len(answer) - 1
    whole = dict(inputs)
    whole["input_ids"] = torch.cat([inputs["input_ids"], answer[None, :-1]], dim=1)
    for name, value in inputs.items():
        if name != "input_ids" and isinstance(value, Tensor) and tuple(value.shape) == (1, prompt):
            filler = torch.full((1, new), int(name == "attention_mask"), dtype=value.dtype)
            whole[name] = torch.cat([value, filler], dim=1)
    hidden = _Hidden(prompt, rules)
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
            return model(**whole, use_cache=False).logits[0, prompt - 1 :]
    finally:
        model.set_attn_implementation(before)


def rules_of(plan: Plan, layout: Layout, depth: int) -> dict[int, Rule]:
    """A plan for one prompt, as rules by layer: of each pool the best stay, as many as the plan's arithmetic says."""
    rules: dict[int, Rule] = {}
    steps = zip(plan.cuts(depth), plan.schedule(layout, depth), strict=True)
    for (layer, step), cut in steps:
        pools = [(np.isin(layout.modality, list(pool)), count) for pool, count in cut.counts.items()]
        rules[layer] = _both(rules.get(layer), _keep_best(step.method, pools, layout))
    return rules


def _both(first: Rule | None, second: Rule) -> Rule:
    return second if first is None else lambda score, hide: second(score, first(score, hide))


def _keep_best(method: str, pools: Sequence[tuple[np.ndarray, int]], layout: Layout) -> Rule:
    def rule(score: Tensor | None, hide: Tensor) -> Tensor:
        for member, count in pools:
            left = [i for i in range(len(hide)) if member[i] and not hide[i]]
            value = {
                "position": _earliness(left, layout).__getitem__,
                "unpadded": lambda i: -int(layout.padding[i]),
            }.get(method)
            if method == "last-query":
                assert score is not None
                value = score.tolist().__getitem__
            assert value is not None, method
            last = len(hide) - 1  # the prompt's last token always stays
            best = sorted(left, key=lambda i: (i == last, value(i), -i), reverse=True)[:count]
            hide[[i for i in left if i not in set(best)]] = True
        return hide

    return rule


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
    """What every layer hides, while the model runs from the first to the last."""

    def __init__(self, prompt: int, rules: Mapping[int, Rule]) -> None:
        self.prompt, self.rules = prompt, rules
        self.latest: Tensor | None = None
        self.hide = torch.zeros(prompt, dtype=torch.bool)
        self.at: dict[int, Tensor] = {}

    def mask(self, index: int, source: int) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if index in self.rules:
                self.hide = self.rules[index](self.latest, self.hide.clone())
            self.at[index] = self.hide
            given = kwargs.get("attention_mask")
            assert given is not None, "eager attention is given a mask"
            gone = torch.zeros(given.shape[-1], dtype=torch.bool)
            gone[: self.prompt] = self.at[source]
            # a dropped token still sees itself, so that its own row is a number; nobody reads it
            unseen = gone[None] & ~torch.eye(len(gone), dtype=torch.bool)
            kwargs["attention_mask"] = given.masked_fill(unseen, torch.finfo(given.dtype).min)
            return args, kwargs

        return before

    def score(self, module: Any, args: Any, output: Any) -> None:
        self.latest = output[1][0, :, self.prompt - 1, : self.prompt].mean(0)
