"""Who serves: vLLM as it is, plans, and vLLM's own video pruning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastav.adapter import ModelAdapter, plan_named
from fastav.engines.vllm import guards, server_args
from fastav.errors import FastAVError, PlanError
from fastav.pipelines import resolve
from fastav.plan import Plan
from fastav.presets import NONE

OFF, GLOBAL, EVS = "off", "global", "vllm-evs"
EVS_MODELS = ("qwen2-5-vl",)  # of those that can be pruned here, which vLLM itself prunes too


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to serve.

    plan: what layers hold; of vLLM's own video pruning nothing is known before it runs. evs: the share of video tokens
    that vLLM itself drops before the first layer.
    """

    name: str
    plan: Plan = NONE
    evs: float | int = 0

    @property
    def prunes(self) -> bool:
        """Whether fastav does anything."""
        return bool(self.plan.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is served.  source: a folder, or a hub id. unpruned: the configuration that prunes nothing."""

    name: str
    source: str
    adapter: ModelAdapter
    unpruned: guards.PruningConfig

    @classmethod
    def of(cls, name: str, source: str) -> "Subject":
        """The model in a folder, or of a hub id.  Raises: UnsupportedModel, CheckpointError."""
        adapter, source, config = resolve(source)
        unpruned = guards.PruningConfig(plan=NONE, adapter=adapter, config=config)
        return cls(name=name, source=source, adapter=adapter, unpruned=unpruned)

    def running(self, plan: Plan) -> guards.PruningConfig:
        """This model by a plan."""
        return guards.PruningConfig(plan=plan, adapter=self.adapter, config=self.unpruned.config)


def contenders(of: Subject, named: Sequence[str], *, gpu: bool) -> tuple[Contender, ...]:
    """Who is asked for by name: `off`, `global`, `vllm-evs@0.5`, or a plan's name or file.

    named: if none, off, the preset fastav's first step alone, all of fastav, and vLLM's own pruning where there is one.
    gpu: whether servers run on one; on a CPU vLLM 0.32 cannot prune by itself (positions stay glued to embeddings).
    Raises: PlanError, UnsupportedPlan, UnsupportedModel, FastAVError.
    """
    usual = [OFF, GLOBAL, "fastav", *([f"{EVS}@0.5"] if gpu and of.adapter.name in EVS_MODELS else [])]
    found = [_contender(of, name, gpu) for name in named or usual]
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PlanError(f"two contenders are called {twice[0]!r}", "give every plan a name of its own")
    return tuple(found)


def _contender(of: Subject, name: str, gpu: bool) -> Contender:
    if name == OFF:
        return Contender(name=OFF)
    if name.partition("@")[0] == EVS:
        return Contender(name=name, evs=_rate(of, name, gpu))
    first = Plan(of.adapter.preset("fastav").steps[:1], GLOBAL)
    plan = first if name == GLOBAL else plan_named(name, of.adapter)
    guards.check_plan(of.running(plan))
    if not plan.steps:
        raise PlanError(f"the plan {name!r} prunes nothing", f"that is what {OFF} does")
    return Contender(name=plan.name or plan.fingerprint, plan=plan)


def _rate(of: Subject, name: str, gpu: bool) -> float:
    """The share that vLLM's own pruning drops.  Raises: FastAVError."""
    if of.adapter.name not in EVS_MODELS:
        raise FastAVError(
            f"vLLM has no pruning of its own for {of.adapter.name}", f"it has for {', '.join(EVS_MODELS)}"
        )
    if not gpu:
        raise FastAVError("vLLM 0.32 cannot prune videos by itself on a CPU", f"leave {name} out")
    try:
        rate = float(name.partition("@")[2])
    except ValueError:
        rate = -1.0
    if not 0 < rate < 1:
        raise FastAVError(f"{name!r} must say which share of a video goes, between 0 and 1", f"{EVS}@0.5")
    return rate


def arguments(of: Subject, one: Contender, common: Mapping[str, str | None], max_model_len: int) -> list[str]:
    """Flags of the server: what all have in common, and what this contender needs.

    common: flags with their values; None for switches. A contender's own come after them, and count.
    """
    found = dict(common)
    if one.prunes:
        found |= {flag.name: flag.value for flag in server_args.flags(of.running(one.plan), max_model_len)}
    if one.evs:
        found["--video-pruning-rate"] = str(one.evs)
    return [word for name, value in found.items() for word in ((name,) if value is None else (name, value))]
