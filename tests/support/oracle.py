"""An independent definition of pruning: nothing is removed; each layer hides what was dropped by an attention mask.

It runs a Qwen2 decoder densely, without a cache, from its weights alone, one unpadded row at a time, and shares no code
with the engine. Budgets come as plain functions so that it does not share the plan's arithmetic either.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, apply_rotary_pos_emb

# (scores of the prompt's tokens in the layer before, or None; what is hidden so far) -> what is hidden from now on
Rule = Callable[[Tensor | None, Tensor], Tensor]


def oracle_logits(
    model: Qwen2ForCausalLM, ids: Tensor, prompt: int, rules: Mapping[int, Rule], embeds: Tensor | None = None
) -> Tensor:
    """Logits [tokens, vocab] of one row whose first `prompt` tokens are the prompt and the rest generated."""
    hidden = model.model.embed_tokens(ids) if embeds is None else embeds
    n = hidden.shape[1]
    cos, sin = model.model.rotary_emb(hidden, torch.arange(n)[None])
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    hide = torch.zeros(prompt, dtype=torch.bool)
    score = None
    for index, layer in enumerate(model.model.layers):
        if index in rules:
            hide = rules[index](score, hide.clone())
        gone = torch.cat([hide, torch.zeros(n - prompt, dtype=torch.bool)])
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        heads = lambda t, d=attention.head_dim: t.view(1, n, -1, d).transpose(1, 2)  # noqa: E731
        q, k = apply_rotary_pos_emb(heads(attention.q_proj(x)), heads(attention.k_proj(x)), cos, sin)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), heads(attention.v_proj(x)).repeat_interleave(groups, 1)
        logits = (q @ k.transpose(-1, -2)) * attention.head_dim**-0.5
        # a dropped token still sees itself, so that its own row is a number; nobody reads it
        near = causal if attention.sliding_window is None else causal.triu(1 - attention.sliding_window)
        seen = (near & ~gone[None]) | torch.eye(n, dtype=torch.bool)
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        score = weights[0, :, prompt - 1, :prompt].mean(0)
        hidden = hidden + attention.o_proj((weights @ v).transpose(1, 2).reshape(1, n, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))[0]


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
