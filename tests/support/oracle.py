"""An independent definition of pruning: nothing is removed; each layer hides what was dropped by an attention mask.

It runs a Qwen2 decoder densely, without a cache, from its weights alone, one unpadded row at a time, and shares no code
with the engine. Budgets come as plain functions so that it does not share the plan's arithmetic either. A conversation
is one row: every turn's prompt has rules of its own, and what it drops is hidden from everything that follows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, apply_rotary_pos_emb

# (scores of the prompt's tokens in the layer before, or None; what is hidden so far) -> what is hidden from now on
Rule = Callable[[Tensor | None, Tensor], Tensor]


@dataclass(frozen=True)
class OwnRule:
    """A rule whose scores are those of the layer about to run."""

    rule: Rule

    def __call__(self, score: Tensor | None, hide: Tensor) -> Tensor:
        return self.rule(score, hide)


@dataclass
class Evidence:
    """What the layers so far computed of the whole conversation.

    maps: attention [tokens, tokens] of each layer, mean over heads. gone: [tokens], what each of them hid. keys: of the
    last layer, [kv_heads, tokens, head]. hidden: [tokens, features], its output, which rules may change. own: attention
    of the layer about to run, on what is there before this turn's rule.
    """

    hidden: Tensor
    maps: list[Tensor] = field(default_factory=list[Tensor])
    gone: list[Tensor] = field(default_factory=list[Tensor])
    keys: Tensor | None = None
    own: Tensor | None = None


# what is known before a layer, and what is hidden of the turn so far -> what is hidden of it from now on
TurnRule = Callable[[Evidence, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The prompt of one turn: tokens `start` to before `end`, and by layer what it hides.

    rules: from this layer on. cache_rules: in this layer alone, from all tokens behind the prompt. until: layers before
    this one hide from all tokens behind the prompt what this one hides.
    """

    start: int
    end: int
    rules: Mapping[int, TurnRule]
    cache_rules: Mapping[int, TurnRule] = field(default_factory=dict[int, TurnRule])
    until: int = 0


def oracle_logits(
    model: Qwen2ForCausalLM, ids: Tensor, prompt: int, rules: Mapping[int, Rule], embeds: Tensor | None = None
) -> Tensor:
    """Logits [tokens, vocab] of one row whose first `prompt` tokens are the prompt and the rest generated."""
    return conversation_logits(model, ids, [turn_of(0, prompt, rules)], embeds)


def turn_of(start: int, end: int, rules: Mapping[int, Rule]) -> Turn:
    """A turn whose rules read the attention of its last query alone."""

    def with_score(rule: Rule) -> TurnRule:
        return lambda seen, hide: rule(seen.maps[-1][end - 1, start:end] if seen.maps else None, hide)

    return Turn(start=start, end=end, rules={layer: with_score(rule) for layer, rule in rules.items()})


def conversation_logits(
    model: Qwen2ForCausalLM, ids: Tensor, turns: Sequence[Turn], embeds: Tensor | None = None
) -> Tensor:
    """Logits [tokens, vocab] of one row: prompts of turns, and what follows each of them."""
    late: list[Tensor] = []  # what layers before `until` of each turn hide from later tokens
    for number, turn in enumerate(turns):  # a turn's own choice depends on the caches of those before it
        late.append(torch.zeros(turn.end - turn.start, dtype=torch.bool))
        if turn.until:
            hidden = _run(model, ids, turns[: number + 1], late, embeds).gone[turn.until]
            late[-1] = hidden[turn.start : turn.end]
    return model.lm_head(model.model.norm(_run(model, ids, turns, late, embeds).hidden))


def _run(
    model: Qwen2ForCausalLM, ids: Tensor, turns: Sequence[Turn], late: Sequence[Tensor], embeds: Tensor | None
) -> Evidence:
    """All layers, in which turns hide from later tokens what `late` says."""
    seen = Evidence((model.model.embed_tokens(ids) if embeds is None else embeds)[0])
    n = len(seen.hidden)
    causal, itself = torch.ones(n, n, dtype=torch.bool).tril(), torch.eye(n, dtype=torch.bool)
    gone = torch.zeros(n, dtype=torch.bool)
    for index, layer in enumerate(model.model.layers):
        gone, sliding = gone.clone(), layer.self_attn.sliding_window
        near = causal if sliding is None else causal.triu(1 - sliding)
        for turn, hides in zip(turns, late, strict=True):
            if index < turn.until:
                near = near.clone()
                near[turn.end :, turn.start : turn.end] &= ~hides
        before, hidden = seen, seen.hidden
        for turn in (*turns, None):  # a turn's rows are final once the caches of those before it are cut
            if turn is not None and index in turn.rules:
                # a dropped token still sees itself, so that its own row is a number; nobody reads it
                own, _, _ = _layer(model, layer, hidden, (near & ~gone[None]) | itself)
                evidence = replace(before, hidden=hidden, own=own)
                gone[turn.start : turn.end] = turn.rules[index](evidence, gone[turn.start : turn.end].clone())
                hidden = evidence.hidden
            attention, keys, output = _layer(model, layer, hidden, (near & ~gone[None]) | itself)
            seen = Evidence(output, [*before.maps, attention], [*before.gone, gone.clone()], keys)
            if turn is not None and index in turn.cache_rules:
                hides = turn.cache_rules[index](replace(seen, own=attention), gone[turn.start : turn.end].clone())
                near = near.clone()
                near[turn.end :, turn.start : turn.end] &= ~hides
    return seen


def _layer(model: Qwen2ForCausalLM, layer: Any, hidden: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention [tokens, tokens] (mean over heads), keys, and output of one layer.  visible: what each token sees."""
    n, attention, x = len(hidden), layer.self_attn, layer.input_layernorm(hidden[None])
    cos, sin = model.model.rotary_emb(x, torch.arange(n)[None])
    heads = lambda t: t.view(1, n, -1, attention.head_dim).transpose(1, 2)  # noqa: E731
    q, keys = apply_rotary_pos_emb(heads(attention.q_proj(x)), heads(attention.k_proj(x)), cos, sin)
    groups = q.shape[1] // keys.shape[1]
    k, v = keys.repeat_interleave(groups, 1), heads(attention.v_proj(x)).repeat_interleave(groups, 1)
    logits = (q @ k.transpose(-1, -2)) * attention.head_dim**-0.5
    weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    output = hidden[None] + attention.o_proj((weights @ v).transpose(1, 2).reshape(1, n, -1))
    return weights[0].mean(0), keys[0], (output + layer.mlp(layer.post_attention_layernorm(output)))[0]


def drop_lowest(member: Tensor, share: float) -> Rule:
    """Hide the lowest floor(share * n) of the n members still there, by the scores; the later of two equals."""

    def rule(score: Tensor | None, hide: Tensor) -> Tensor:
        assert score is not None
        left = [i for i in range(len(hide)) if member[i] and not hide[i]]
        for i in sorted(left, key=lambda i: (score[i].item(), -i))[: int(share * len(left) + 1e-9)]:
            hide[i] = True
        return hide

    return rule


def keep_only_first(member: Tensor, number: int) -> Rule:
    """Hide all members but the first so many."""

    def rule(score: Tensor | None, hide: Tensor) -> Tensor:
        return hide | (member & (member.cumsum(0) > number))

    return rule
