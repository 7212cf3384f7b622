"""Prompts, a FastAV plan, and the same plan as the oracle's rules."""

from typing import Any

from torch import Tensor
from transformers import Qwen2ForCausalLM

from fastav.budgets import Tokens
from fastav.engines.transformers import Pruning, prune
from fastav.plan import Keep, Plan
from fastav.presets import fastav
from support.oracle import Rule, drop_lowest, keep_only_first
from support.tiny import AUDIO_ID, VIDEO_ID, TinyAdapter, prompt

STEPS = 6
PLAN = fastav(Keep(audio=Tokens(4), video=Tokens(14)), drop=0.2)
ROWS = [prompt(seed=1), prompt(before=5, video=20, audio=3, after=2, seed=2), prompt(video=0, audio=9, seed=3)]


def rules_of(ids: Tensor, depth: int = 6) -> dict[int, Rule]:
    """What `PLAN` hides of this row."""
    audio, video = ids[0] == AUDIO_ID, ids[0] == VIDEO_ID
    first = [keep_only_first(audio, 4), keep_only_first(video, 14)]
    rules = {depth // 2: lambda score, hide: first[1](score, first[0](score, hide))}
    return rules | {layer: drop_lowest(audio | video, 0.2) for layer in range(depth // 2 + 1, depth)}


def generate(
    model: Qwen2ForCausalLM, inputs: dict[str, Tensor], plan: Plan = PLAN, **options: Any
) -> tuple[Any, Pruning]:
    """Generate while pruning."""
    with prune(model, plan, adapter=TinyAdapter()) as pruning:
        out = model.generate(
            **inputs,
            **{"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            | options,
        )
    return out, pruning
