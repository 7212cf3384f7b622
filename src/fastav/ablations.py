"""FastAV's ablations as plans: which tokens a cut removes, from which layer on, and how many.

A strategy is called by what it REMOVES, as in the paper's tables; a method (`fastav.methods`) is described by what it
KEEPS. So `low-attentive` removes the tokens with the least attention, and its method `last-query` keeps those with the
most; `top-informative` removes the tokens with the most rollout, and its method `rollout` with `lowest` keeps those
with the least. What FastAV does is to remove low-informative tokens once and low-attentive ones afterwards.

Source: arXiv:2601.13143, ablation tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastav.errors import PlanError
from fastav.plan import Keep, Plan, Share, Step
from fastav.presets import NONE
from fastav.registry import unknown_name

TABLES = ("global", "fine", "start", "drop")

GLOBAL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "random": ("random", {}),
    "top-attentive": ("last-query", {"lowest": True}),
    "low-attentive": ("last-query", {}),
    "top-informative": ("rollout", {"lowest": True}),
    "low-informative": ("rollout", {}),
    "position": ("position", {}),
}
"""Strategies of the global cut, by what it removes: the method that scores, with its options; the highest scores stay.

random: chance, with seed 0. top-attentive, low-attentive: what the last query of the layer before attends to most, or
least. top-informative, low-informative: what reaches the last query most, or least, through all layers so far, by the
rollout of the prompt at hand. position: the latest tokens, FastAV's fixed rule, which the paper reads off rollouts made
beforehand, so that its row low-informative is this one.
"""

FINE = {name: GLOBAL[name] for name in ("random", "top-attentive", "low-attentive")}
"""Strategies of the fine cuts, of the same meaning."""

EIGHTHS = (2, 3, 4, 5, 6)  # of the depth, where the sweep of the start layer begins; ours: the paper's are not known
DROPS = (0.0, 0.1, 0.2, 0.3)  # P, the paper's


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A row of a table.  plan: under the name that its results carry. own: whether the plan that is varied does so.

    Plans of the same name are the same plan, in all tables.
    """

    label: str
    plan: Plan
    is_original: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One ablation.  settings: the unpruned model first."""

    name: str
    title: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _GlobalAndFine:
    """A plan of FastAV, taken apart.  start: the layer of the global cut, in a decoder of this depth."""

    plan: Plan
    global_cut: Step
    fine: tuple[Step, ...]
    start: int
    depth: int


def tables(plan: Plan, depth: int, names: Iterable[str] = TABLES) -> tuple[Table, ...]:
    """The ablations of a plan of FastAV in a decoder of this depth.

    global: the global cut alone, by each strategy. fine: the fine cuts by each strategy, after the plan's own global
    cut. start: the global cut at several layers, fine cuts after it. drop: several P, the share that each fine cut
    removes; at P = 0 the global cut stands alone.

    Of the first two every row keeps as many tokens of each budget at every layer, known from the layout alone, so that
    all cost the same FLOPs. Budgets are the plan's own: where the global cut names audio alone, every strategy chooses
    among the audio tokens, and video stays whole.

    Source: arXiv:2601.13143, ablation tables.
    Differs: attention and rollout are the last query's; which pool the paper's strategies choose from is not known.
    Raises: UnknownName for a table; PlanError if there is none, if the plan is not FastAV's, or if for `start` and
    `drop` it does not cut entering every later layer.
    """
    unique = tuple(dict.fromkeys(names))
    if not unique:
        raise PlanError("there is no table to make", f"known: {', '.join(TABLES)}")
    for name in unique:
        if name not in TABLES:
            raise unknown_name("table", name, TABLES)
    split = _split(plan, depth)
    makers = {"global": _global, "fine": _fine, "start": _start, "drop": _drop}
    return tuple(makers[name](split) for name in unique)


def plans(ablations: Iterable[Table]) -> dict[str, Plan]:
    """The plans of some tables by their names, each once, as an `Evaluation` takes them."""
    return {setting.plan.name: setting.plan for table in ablations for setting in table.settings}


def _global(split: _GlobalAndFine) -> Table:
    settings = [Setting(label=name, plan=_global_only(split, name), is_original=name == "position") for name in GLOBAL]
    return _table("global", f"global cut entering layer {split.start}, alone: what it removes", settings)


def _fine(split: _GlobalAndFine) -> Table:
    settings = []
    for name, (method, options) in FINE.items():
        steps = (split.global_cut, *(replace(step, method=method, options=options) for step in split.fine))
        settings.append(_setting(name, Plan(steps, f"fine-{name}"), split))
    return _table("fine", "fine cuts after the global one: what they remove", settings)


def _start(split: _GlobalAndFine) -> Table:
    _require_every_later_layer(split)
    settings = []
    for start in sorted({split.depth * eighths // 8 for eighths in EIGHTHS} | {split.start}):
        fine = (replace(step, layers=f"{start}+1..") for step in split.fine)
        swept = Plan((replace(split.global_cut, layers=str(start)), *fine), f"start-{start}")
        settings.append(_setting(f"layer {start}", split.plan if start == split.start else swept, split))
    return _table("start", "layer of the global cut", settings)


def _drop(split: _GlobalAndFine) -> Table:
    own_drop = _require_every_later_layer(split)
    settings = []
    for drop in sorted({*DROPS, own_drop}):
        share = Share(round(1 - drop, 12))
        fine = (replace(step, keep=Keep(**dict.fromkeys(step.keep.to_dict(), share))) for step in split.fine)
        pruned = Plan((split.global_cut, *fine), f"drop-{100 * drop:g}") if drop else _global_only(split, "position")
        settings.append(_setting(f"P = {100 * drop:g} %", split.plan if drop == own_drop else pruned, split))
    return _table("drop", "P, the share that every fine cut removes", settings)


def _global_only(split: _GlobalAndFine, name: str) -> Plan:
    """The global cut without fine ones, by this strategy."""
    method, options = GLOBAL[name]
    return Plan((replace(split.global_cut, method=method, options=options),), f"global-{name}")


def _setting(label: str, plan: Plan, split: _GlobalAndFine) -> Setting:
    is_original = plan.steps == split.plan.steps
    return Setting(label=label, plan=split.plan if is_original else plan, is_original=is_original)


def _table(name: str, title: str, settings: Iterable[Setting]) -> Table:
    return Table(name=name, title=title, settings=(Setting(label="without pruning", plan=NONE), *settings))


def _split(plan: Plan, depth: int) -> _GlobalAndFine:
    """Raises: PlanError if it is not one cut by position and then cuts by last-query."""
    plan.cuts(depth)  # raises if a layer does not exist
    if not _is_fastav(plan.steps, depth):
        raise PlanError(
            f"the plan {plan.name or plan.fingerprint!r} cannot be ablated: it is not one cut by position and then "
            "cuts by last-query",
            "vary the preset fastav, or what fastav plan write makes of it",
        )
    global_cut, *fine = plan.steps
    (start,) = global_cut.layer_range(depth)
    return _GlobalAndFine(
        plan=replace(plan, name="fastav"), global_cut=global_cut, fine=tuple(fine), start=start, depth=depth
    )


def _is_fastav(steps: Sequence[Step], depth: int) -> bool:
    if len(steps) < 2 or any(step.cache_only or step.options for step in steps):
        return False
    global_cut, *fine = steps
    entries = global_cut.layer_range(depth)
    return (global_cut.method, {step.method for step in fine}, len(entries)) == ("position", {"last-query"}, 1) and all(
        layer > entries[0] for step in fine for layer in step.layer_range(depth)
    )


def _require_every_later_layer(split: _GlobalAndFine) -> float:
    """The share that the fine cuts remove.  Raises: PlanError if they are not one share entering every later layer."""
    fine, *others = split.fine
    budgets = set(fine.keep.pools().values())
    shares = [budget.share for budget in budgets if isinstance(budget, Share)]
    later_layers = range(split.start + 1, split.depth)
    if others or fine.layer_range(split.depth) != later_layers or len(budgets) != 1 or not shares:
        raise PlanError(
            f"the plan's fine cuts are not one share entering every layer after {split.start}, so there is neither a "
            "start layer nor a P to sweep",
            "the tables global and fine can be made",
        )
    return round(1 - shares[0], 12)
