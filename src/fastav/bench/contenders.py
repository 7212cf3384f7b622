"""Who is measured against whom."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from fastav.adapter import plan_named
from fastav.bench.subjects import Prompt, Subject
from fastav.engines.transformers import TransformersEngine
from fastav.errors import FastAVError, PlanError, UnsupportedPlan
from fastav.method import Signal, method_of
from fastav.plan import Plan
from fastav.presets import NONE

BASE = "transformers"  # what all others are compared with
USUAL = ("fastav", "fastv", "pyramiddrop")
ATTENTIONS = {"sdpa": "sdpa", "eager": "eager", "flash_attention_2": "fa2", "flash_attention_3": "fa3"}  # in short


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to answer.

    ours: whether our decoding chooses the tokens; else transformers' own `generate` does. compiled: whether norms and
    MLPs are.
    """

    name: str
    plan: Plan
    attention: str
    ours: bool
    compiled: bool = False


def contenders(plans: Sequence[Plan], attentions: Sequence[str], *, compiled: bool = False) -> tuple[Contender, ...]:
    """transformers' own with every kind of attention; ours with the first of them, unpruned and by every plan.

    compiled: also ours with norms and MLPs compiled, unpruned and by the first plan.
    """
    first, *others = attentions
    twice = [("unpruned compiled", NONE), *((f"{plan.name} compiled", plan) for plan in plans[:1])] if compiled else []
    return (
        Contender(name=BASE, plan=NONE, attention=first, ours=False),
        *(Contender(name=f"{BASE} {ATTENTIONS[kind]}", plan=NONE, attention=kind, ours=False) for kind in others),
        Contender(name="unpruned", plan=NONE, attention=first, ours=True),
        *(Contender(name=plan.name or plan.fingerprint, plan=plan, attention=first, ours=True) for plan in plans),
        *(Contender(name=name, plan=plan, attention=first, ours=True, compiled=True) for name, plan in twice),
    )


def attentions(named: Sequence[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Kinds of attention to measure, and why others are not.

    named: kinds that are asked for; if none, sdpa and what else is installed.
    Raises: FastAVError for one that is unknown or cannot be had.
    """
    there = {"flash_attention_2": is_flash_attn_2_available(), "flash_attention_3": is_flash_attn_3_available()}
    missing = {
        name: "needs CUDA" if device.type != "cuda" else "not installed"
        for name, installed in there.items()
        if device.type != "cuda" or not installed
    }
    for name in named:
        if name not in ATTENTIONS:
            raise FastAVError(f"no attention is called {name!r}", f"known: {', '.join(ATTENTIONS)}")
        if name in missing:
            raise FastAVError(f"{name} cannot be measured here: {missing[name]}", "leave it out of --attention")
    if named:
        return list(dict.fromkeys(named)), {}
    return ["sdpa", *(name for name in there if name not in missing)], missing


def plans(
    of: Subject, named: Sequence[str], prompts: Sequence[Prompt], attention: str
) -> tuple[list[Plan], dict[str, str]]:
    """Plans to measure, and why others are not.

    named: plans that are asked for; if none, the usual ones, of which those that the model cannot have are left out.
    Raises: UnknownName, PlanError, UnsupportedPlan for one that is asked for and unknown, cannot be carried out, or
    drops nothing of the prompts.
    """
    found: list[Plan] = []
    skipped: dict[str, str] = {}
    for name in named or USUAL:
        try:
            plan = plan_named(name, of.adapter)
            if plan.steps:  # `none` is measured in any case
                _require_sound(of, plan, prompts, attention)
                found.append(plan)
        except (PlanError, UnsupportedPlan) as error:
            if named:
                raise
            skipped[name] = str(error)
    if twice := [plan.name for plan in found if [other.name for other in found].count(plan.name) > 1]:
        raise PlanError(f"two plans are called {twice[0]!r}", "give every plan a name of its own")
    return found, skipped


def _require_sound(of: Subject, plan: Plan, prompts: Sequence[Prompt], attention: str) -> None:
    """Refuse a plan that could not run on these prompts, or would do nothing."""
    if any(Signal.ENCODER in method_of(step).needs for step in plan.steps):
        raise UnsupportedPlan(
            f"{plan.name} asks for the audio encoder's attention, and prompts are embeddings here", "leave it out"
        )
    TransformersEngine.check(of.config, plan, attention, adapter=of.adapter)
    depth = of.adapter.shape(of.config).layers
    for prompt in prompts:
        layout = prompt.layout
        if sum(plan.cached(layout, depth)) == depth * len(layout):
            there = ", ".join(f"{n:,} {kind}" for kind, n in layout.by_modality().items())
            padding = "" if layout.padding.any() else ", no padding"
            raise PlanError(
                f"the plan {plan.name!r} drops nothing of a prompt of {there}{padding}",
                "take a plan for what this model's prompts have",
            )
