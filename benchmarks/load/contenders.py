"""The contenders: vLLM as it is, plans, and vLLM's own video pruning, each with ways to schedule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fastav.adapter import ModelAdapter, plan_named
from fastav.bench.contenders import require_unique
from fastav.engines.vllm import guards, server_args
from fastav.errors import FastAVError, PlanError
from fastav.pipelines import resolve
from fastav.plan import Plan
from fastav.presets import NONE

OFF, GLOBAL, EVS = "off", "global", "vllm-evs"
CHUNKS, PREFIX = "chunks", "prefix"  # behind a name, with +
EVS_MODELS = ("qwen2-5-vl",)  # the models that vLLM can prune by itself, among those that fastav can prune in it


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerContender:
    """One way to serve.

    plan: NONE too for vLLM's own video pruning, whose tokens are unknown before it runs. evs: the share of video tokens
    that vLLM itself drops before the first layer. flags: with their values, in place of those of all servers; None for
    switches.
    """

    name: str
    plan: Plan = NONE
    evs: float | int = 0
    flags: Mapping[str, str | None] = field(default_factory=dict[str, str | None])

    @property
    def chunks(self) -> bool:
        """Whether prompts run in chunks, whose borders depend on what else runs."""
        return "--max-num-batched-tokens" in self.flags

    @property
    def prunes(self) -> bool:
        """Whether fastav prunes."""
        return bool(self.plan.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model that servers load.  source: a folder, or a hub id."""

    name: str
    source: str
    adapter: ModelAdapter
    unpruned: guards.PruningConfig

    @classmethod
    def of(cls, name: str, source: str) -> "ServedModel":
        """The model in a folder, or of a hub id.  Raises: UnsupportedModel, CheckpointError."""
        adapter, source, config = resolve(source)
        unpruned = guards.PruningConfig(plan=NONE, adapter=adapter, config=config)
        return cls(name=name, source=source, adapter=adapter, unpruned=unpruned)

    def pruned(self, plan: Plan) -> guards.PruningConfig:
        """This model with a plan."""
        return guards.PruningConfig(plan=plan, adapter=self.adapter, config=self.unpruned.config)


def contenders(model: ServedModel, names: Sequence[str], *, gpu: bool) -> tuple[ServerContender, ...]:
    """The contenders with these names: `off`, `global`, `vllm-evs@0.5`, or a plan's name or file.

    A name may end in `+chunks=512` (a step has at most so many tokens) and in `+prefix` (prefix caching is on).

    names: if none, off, the first step of the preset fastav, all of fastav, and vLLM's own pruning if it supports the
    model.
    gpu: whether servers run on one; on a CPU vLLM 0.32 cannot prune by itself (positions stay glued to embeddings).
    Raises: PlanError, UnsupportedPlan, UnsupportedModel, FastAVError.
    """
    default = [OFF, GLOBAL, "fastav", *([f"{EVS}@0.5"] if gpu and model.adapter.name in EVS_MODELS else [])]
    selected = tuple(_contender(model, name, gpu) for name in names or default)
    require_unique("contenders", [one.name for one in selected])
    return selected


def _contender(model: ServedModel, name: str, gpu: bool) -> ServerContender:
    base, *ways = name.split("+")
    flags: dict[str, str | None] = {}
    for way in ways:
        kind, _, value = way.partition("=")
        if kind == CHUNKS and value.isdecimal() and int(value) > 1:
            flags["--max-num-batched-tokens"] = value
        elif way == PREFIX:
            flags["--enable-prefix-caching"] = None
        else:
            raise FastAVError(f"{name!r} ends in +{way}, which is unknown", f"+{CHUNKS}=512, +{PREFIX}")
    if not ways:
        return _plain(model, name, gpu)
    return replace(_plain(model, base, gpu), name=name, flags=flags)


def _plain(model: ServedModel, name: str, gpu: bool) -> ServerContender:
    if name == OFF:
        return ServerContender(name=OFF)
    if name.partition("@")[0] == EVS:
        return ServerContender(name=name, evs=_evs_share(model, name, gpu))
    first = Plan(model.adapter.preset("fastav").steps[:1], GLOBAL)
    plan = first if name == GLOBAL else plan_named(name, model.adapter)
    guards.check_plan(model.pruned(plan))
    if not plan.steps:
        raise PlanError(f"the plan {name!r} prunes nothing", f"use {OFF}")
    return ServerContender(name=plan.name or plan.fingerprint, plan=plan)


def _evs_share(model: ServedModel, name: str, gpu: bool) -> float:
    """The share that vLLM's own pruning drops.  Raises: FastAVError."""
    if model.adapter.name not in EVS_MODELS:
        raise FastAVError(
            f"vLLM has no pruning of its own for {model.adapter.name}", f"it has for {', '.join(EVS_MODELS)}"
        )
    if not gpu:
        raise FastAVError("vLLM 0.32 cannot prune videos by itself on a CPU", f"leave {name} out")
    try:
        share = float(name.partition("@")[2])
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise FastAVError(f"{name!r} must give the share of a video to drop, between 0 and 1", f"{EVS}@0.5")
    return share


def server_flags(
    model: ServedModel, contender: ServerContender, common: Mapping[str, str | None], max_model_len: int
) -> list[str]:
    """Flags of a contender's server.

    common: flags of all servers with their values; None for switches. The contender's own flags override them.
    """
    values = {name: () if value is None else (value,) for name, value in common.items()}
    if contender.prunes:
        values |= {flag.name: flag.args[1:] for flag in server_args.flags(model.pruned(contender.plan), max_model_len)}
    if contender.evs:
        values["--video-pruning-rate"] = (str(contender.evs),)
    if "--enable-prefix-caching" in contender.flags:
        values.pop("--no-enable-prefix-caching", None)
    values |= {name: () if value is None else (value,) for name, value in contender.flags.items()}
    return [word for name, words in values.items() for word in (name, *words)]
