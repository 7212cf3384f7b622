"""FastAV's ablations as plans: which tokens a cut removes, at which layer, and how many.

A strategy is named after what it REMOVES, as in the paper's tables; a method (`fastav.methods`) is described by what it
KEEPS. So `low-attentive` removes the tokens with the least attention, and its method `last-query` keeps those with the
most. `top-informative` removes the tokens with the most rollout, and its method `rollout` with `lowest` keeps those
with the least. FastAV removes low-informative tokens once, and low-attentive tokens afterwards.

Source: arXiv:2601.13143, ablation tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastav.budgets import Share
from fastav.errors import PlanError
from fastav.plan import Keep, Plan, Step
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
"""Strategies of the global cut, by what they remove: the scoring method and its options. The highest scores stay.

random: random tokens, with seed 0. top-attentive, low-attentive: the tokens that the last query of the previous layer
attends to most, or least. top-informative, low-informative: the tokens with the most, or least, rollout to the last
query through all layers so far, of the same prompt. position: the latest tokens. This is FastAV's fixed rule, which the
paper derives from rollouts computed beforehand; the paper's row low-informative is this one.
"""

FINE = {name: GLOBAL[name] for name in ("random", "top-attentive", "low-attentive")}
"""Strategies of the fine cuts, with the same meaning."""

EIGHTHS = (2, 3, 4, 5, 6)  # of the depth: layers of the global cut in the sweep; ours, the paper does not give its own
DROPS = (0.0, 0.1, 0.2, 0.3)  # values of P, from the paper


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A row of a table.

    plan: its name is the name that its results carry; plans of the same name are equal in all tables. is_original:
    whether this is the setting of the plan that is varied.
    """

    label: str
    plan: Plan
    is_original: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One ablation.  settings: its rows, the unpruned model first."""

    name: str
    title: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _GlobalAndFine:
    """The parts of a FastAV plan.  start: the layer of the global cut, in a decoder of this depth."""

    plan: Plan
    global_cut: Step
    fine: tuple[Step, ...]
    start: int
    depth: int


def tables(plan: Plan, depth: int, names: Iterable[str] = TABLES) -> tuple[Table, ...]:
    """The ablations of a FastAV plan in a decoder of this depth.

    global: the global cut alone, by each strategy. fine: the fine cuts by each strategy, after the plan's own global
    cut. start: the global cut at several layers, with fine cuts after it. drop: several values of P, the share that
    each fine cut removes; at P = 0 there is only the global cut.

    In the first two tables all rows keep the same number of tokens of each budget at every layer, so all cost the same
    FLOPs. The layout alone determines the numbers. Budgets are those of the plan: if its global cut names only audio,
    every strategy chooses among the audio tokens, and all video stays.

    Source: arXiv:2601.13143, ablation tables.
    Differs: attention and rollout are the last query's; the paper does not say which pool its strategies choose from.
    Raises: UnknownName for a table; PlanError if there is no table, if the plan is not FastAV's, or, for `start` and
    `drop`, if its fine cuts are not at every later layer.
    """
    unique = tuple(dict.fromkeys(names))
    if not unique:
        raise PlanError("no table is given", f"known: {', '.join(TABLES)}")
    for name in unique:
        if name not in TABLES:
            raise unknown_name("table", name, TABLES)
    split = _split(plan, depth)
    makers = {"global": _global, "fine": _fine, "start": _start, "drop": _drop}
    return tuple(makers[name](split) for name in unique)


def plans(ablations: Iterable[Table]) -> dict[str, Plan]:
    """The plans of some tables by name, each once, as `Evaluation` takes them."""
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
    """The global cut without fine cuts, by this strategy."""
    method, options = GLOBAL[name]
    return Plan((replace(split.global_cut, method=method, options=options),), f"global-{name}")


def _setting(label: str, plan: Plan, split: _GlobalAndFine) -> Setting:
    is_original = plan.steps == split.plan.steps
    return Setting(label=label, plan=split.plan if is_original else plan, is_original=is_original)


def _table(name: str, title: str, settings: Iterable[Setting]) -> Table:
    return Table(name=name, title=title, settings=(Setting(label="without pruning", plan=NONE), *settings))


def _split(plan: Plan, depth: int) -> _GlobalAndFine:
    """The global and the fine cuts.  Raises: PlanError if the plan is not one cut by position and then cuts by
    last-query.
    """
    plan.cuts(depth)  # raises if a layer does not exist
    if not _is_fastav(plan.steps, depth):
        raise PlanError(
            f"the plan {plan.name or plan.fingerprint!r} cannot be ablated: it is not one cut by position and then "
            "cuts by last-query",
            "use the preset fastav, or a plan that fastav plan write derived from it",
        )
    global_cut, *fine = plan.steps
    (start,) = global_cut.layer_range(depth)
    return _GlobalAndFine(
        plan=replace(plan, name="fastav"), global_cut=global_cut, fine=tuple(fine), start=start, depth=depth
    )


def _is_fastav(steps: Sequence[Step], depth: int) -> bool:
    if len(steps) < 2 or any(step.cache_only or step.earlier_caches or step.options for step in steps):
        return False
    global_cut, *fine = steps
    entries = global_cut.layer_range(depth)
    return (global_cut.method, {step.method for step in fine}, len(entries)) == ("position", {"last-query"}, 1) and all(
        layer > entries[0] for step in fine for layer in step.layer_range(depth)
    )


def _require_every_later_layer(split: _GlobalAndFine) -> float:
    """The share that the fine cuts remove.  Raises: PlanError if they are not one share at every later layer."""
    fine, *others = split.fine
    budgets = set(fine.keep.pools().values())
    shares = [budget.share for budget in budgets if isinstance(budget, Share)]
    later_layers = range(split.start + 1, split.depth)
    if others or fine.layer_range(split.depth) != later_layers or len(budgets) != 1 or not shares:
        raise PlanError(
            f"the plan's fine cuts are not one share at every layer after {split.start}, so there is neither a start "
            "layer nor a P to sweep",
            "use the tables global and fine",
        )
    return round(1 - shares[0], 12)
