"""The contenders: transformers' own `generate`, our engine unpruned, and plans."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from fastav.adapter import plan_named
from fastav.bench.specs import ModelSpec, PromptSpec
from fastav.engines.transformers import TransformersEngine
from fastav.errors import FastAVError, PlanError, UnsupportedPlan
from fastav.method import ENCODER_SIGNALS
from fastav.plan import Plan
from fastav.presets import NONE

BASELINE = "transformers"  # the contender that ratios are taken over
DEFAULT_PLANS = ("fastav", "fastv", "pyramiddrop")
ATTENTION_LABELS = {"sdpa": "sdpa", "eager": "eager", "flash_attention_2": "fa2", "flash_attention_3": "fa3"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to answer.

    ours: whether our decoding loop generates; else transformers' own `generate` does. compiled: whether norms and MLPs
    are.
    """

    name: str
    plan: Plan
    attention: str
    ours: bool
    compiled: bool = False


def contenders(plans: Sequence[Plan], attentions: Sequence[str], *, compiled: bool = False) -> tuple[Contender, ...]:
    """transformers with every kind of attention; our engine with the first, unpruned and by every plan.

    compiled: also our engine with norms and MLPs compiled, unpruned and by the first plan.
    """
    first, *others = attentions
    again = [("unpruned compiled", NONE), *((f"{plan.name} compiled", plan) for plan in plans[:1])] if compiled else []
    return (
        Contender(name=BASELINE, plan=NONE, attention=first, ours=False),
        *(
            Contender(name=f"{BASELINE} {ATTENTION_LABELS[kind]}", plan=NONE, attention=kind, ours=False)
            for kind in others
        ),
        Contender(name="unpruned", plan=NONE, attention=first, ours=True),
        *(Contender(name=plan.name or plan.fingerprint, plan=plan, attention=first, ours=True) for plan in plans),
        *(Contender(name=name, plan=plan, attention=first, ours=True, compiled=True) for name, plan in again),
    )


def require_unique(kind: str, names: Sequence[str]) -> None:
    """Raises: PlanError if two are called alike.  kind: a plural, such as `plans`."""
    if repeated := [name for name in names if names.count(name) > 1]:
        raise PlanError(f"two {kind} are called {repeated[0]!r}", "give every plan a name of its own")


def available_attentions(names: Sequence[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The kinds of attention to measure, and the reasons why others are skipped.

    names: kinds that the user gives; if none, sdpa and whichever flash attention is installed.
    Raises: FastAVError for a kind that is unknown or not available.
    """
    installed = {"flash_attention_2": is_flash_attn_2_available(), "flash_attention_3": is_flash_attn_3_available()}
    missing = {
        name: "needs CUDA" if device.type != "cuda" else "not installed"
        for name, available in installed.items()
        if device.type != "cuda" or not available
    }
    for name in names:
        if name not in ATTENTION_LABELS:
            raise FastAVError(f"no attention is called {name!r}", f"known: {', '.join(ATTENTION_LABELS)}")
        if name in missing:
            raise FastAVError(f"{name} cannot be measured here: {missing[name]}", "leave it out of --attention")
    if names:
        return list(dict.fromkeys(names)), {}
    return ["sdpa", *(name for name in installed if name not in missing)], missing


def supported_plans(
    model: ModelSpec, names: Sequence[str], prompts: Sequence[PromptSpec], attention: str
) -> tuple[list[Plan], dict[str, str]]:
    """The plans to measure, and the reasons why others are skipped.

    names: plans that the user gives; if none, the default ones without those that the model does not support.
    Raises: UnknownName, PlanError, UnsupportedPlan for a given plan that is unknown, is not supported, or drops nothing
    of the prompts.
    """
    plans: list[Plan] = []
    skipped: dict[str, str] = {}
    for name in names or DEFAULT_PLANS:
        try:
            plan = plan_named(name, model.adapter).for_decoder(model.adapter.shape(model.config))
            if plan.steps:  # `none` is measured in any case
                _require_effect(model, plan, prompts, attention)
                plans.append(plan)
        except (PlanError, UnsupportedPlan) as error:
            if names:
                raise
            skipped[name] = str(error)
    require_unique("plans", [plan.name for plan in plans])
    return plans, skipped


def _require_effect(model: ModelSpec, plan: Plan, prompts: Sequence[PromptSpec], attention: str) -> None:
    """Raises: PlanError, UnsupportedPlan for a plan that cannot run on these prompts, or drops nothing of them."""
    compiled = TransformersEngine.check(model.config, plan, attention, adapter=model.adapter)
    if compiled.needs & ENCODER_SIGNALS:
        raise UnsupportedPlan(
            f"{plan.name} reads the attention of encoders, and prompts are embeddings here", "leave it out"
        )
    depth = model.adapter.shape(model.config).layers
    for prompt in prompts:
        layout = prompt.layout
        if sum(plan.cache_tokens(layout, depth)) == depth * len(layout):
            tokens = ", ".join(f"{n:,} {kind}" for kind, n in layout.by_modality().items())
            padding = "" if layout.padding.any() else ", no padding"
            raise PlanError(
                f"the plan {plan.name!r} drops nothing of a prompt of {tokens}{padding}",
                "use a plan that prunes the modalities of this model's prompts",
            )
