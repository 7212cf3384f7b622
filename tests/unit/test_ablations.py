"""Ablations as plans: what each strategy removes, what a table varies, and what is refused."""

from dataclasses import replace

import pytest
import torch

from fastav import presets
from fastav.ablations import FINE, GLOBAL, TABLES, plans, tables
from fastav.budgets import Before, Share, Tokens
from fastav.engines.transformers import prune
from fastav.errors import PlanError, UnknownName
from fastav.method import method_of
from fastav.methods.last_query import LastQuery
from fastav.methods.position import Position
from fastav.methods.random import Random
from fastav.methods.rollout import Rollout
from fastav.plan import Keep, Plan, Step
from support.tiny import AUDIO_ID, VIDEO_ID, TinyAdapter, layout_of, prompt, tiny_model

DEPTH = 28
PRESET = presets.fastav(Keep(audio=Tokens(10)))
SMALL = presets.fastav(Keep(media=Share(0.4)))  # for the tiny model: 6 layers, 28 audio and video tokens
KEPT = 12  # of them


def by_label(plan, name, depth=DEPTH):
    (table,) = tables(plan, depth, [name])
    return {setting.label: setting for setting in table.settings}


def test_strategies_are_named_by_what_they_remove_and_their_methods_by_what_they_keep():
    coarse = {label: setting.plan.steps for label, setting in by_label(PRESET, "global").items()}
    assert coarse.pop("without pruning") == ()
    assert {label: method_of(step) for label, (step,) in coarse.items()} == {
        "random": Random(seed=0),
        "top-attentive": LastQuery(lowest=True),
        "low-attentive": LastQuery(lowest=False),
        "top-informative": Rollout(lowest=True),
        "low-informative": Rollout(lowest=False),
        "position": Position(),
    }
    for (step,) in coarse.values():
        assert (step.layers, step.keep) == ("middle", Keep(audio=Tokens(10)))
    fine = {label: setting.plan.steps for label, setting in by_label(PRESET, "fine").items() if setting.plan.steps}
    assert {label: method_of(step) for label, (_, step) in fine.items()} == {
        "random": Random(seed=0),
        "top-attentive": LastQuery(lowest=True),
        "low-attentive": LastQuery(lowest=False),
    }
    for first, step in fine.values():
        assert first == PRESET.steps[0]
        assert (step.layers, step.keep) == ("middle+1..", Keep(media=Share(0.8)))


@pytest.mark.parametrize(
    ("strategy", "row", "keeps_highest"),
    [
        ("top-informative", "rollout", False),
        ("low-informative", "rollout", True),
        ("top-attentive", "attention", False),
        ("low-attentive", "attention", True),
    ],
)
def test_what_is_removed_goes_and_the_rest_stays(strategy, row, keeps_highest):
    """Against attention maps of the unpruned model: rollout is a product of matrices there."""
    ids = prompt(seed=4)
    with torch.no_grad():
        maps = [a[0].mean(0) for a in tiny_model("eager")(ids, output_attentions=True, use_cache=False).attentions[:3]]
    rollout = torch.eye(ids.shape[1])
    for attention in maps:
        rollout = (0.5 * attention + 0.5 * torch.eye(ids.shape[1])) @ rollout
    score = rollout[-1] if row == "rollout" else maps[2][-1]

    media = [i for i, token in enumerate(ids[0].tolist()) if token in (AUDIO_ID, VIDEO_ID)]
    ranked = sorted(media, key=lambda i: score[i].item(), reverse=True)
    stay = ranked[:KEPT] if keeps_highest else ranked[-KEPT:]

    with prune(tiny_model(), by_label(SMALL, "global", 6)[strategy].plan, adapter=TinyAdapter()) as pruning:
        with torch.no_grad():
            pruning.model(ids)
        kept = pruning.slots()
    (_, slots) = kept[-1]
    assert sorted(set(slots[0].tolist()) & set(media)) == sorted(stay)


def test_one_plan_stands_in_all_tables_under_one_name():
    found = tables(PRESET, DEPTH)
    own = {table.name: next(setting for setting in table.settings if setting.is_original) for table in found}
    assert {name: setting.label for name, setting in own.items()} == {
        "global": "position",
        "fine": "low-attentive",
        "start": "layer 14",
        "drop": "P = 20 %",
    }
    assert {own[name].plan for name in ("fine", "start", "drop")} == {PRESET}
    assert by_label(PRESET, "drop")["P = 0 %"].plan == own["global"].plan
    settings = [setting for table in found for setting in table.settings]
    for setting in settings:
        assert plans(found)[setting.plan.name] == setting.plan
    assert len({plan.fingerprint for plan in plans(found).values()}) == len(plans(found)) == 16
    assert next(iter(plans(found))) == "none"


def test_the_sweep_of_the_start_moves_all_cuts():
    rows = by_label(PRESET, "start")
    assert list(rows)[1:] == ["layer 7", "layer 10", "layer 14", "layer 17", "layer 21"]
    for label, setting in list(rows.items())[1:]:
        start = int(label.removeprefix("layer "))
        cuts = setting.plan.cuts(DEPTH)
        assert [layer for layer, _ in cuts] == list(range(start, DEPTH))
        assert {step.keep for _, step in cuts[1:]} == {Keep(media=Share(0.8))}
        assert cuts[0][1].keep == Keep(audio=Tokens(10))


def test_the_sweep_of_p_changes_the_share_alone():
    rows = {label: setting.plan for label, setting in by_label(PRESET, "drop").items()}
    assert rows == {
        "without pruning": presets.NONE,
        "P = 0 %": replace(presets.fastav(Keep(audio=Tokens(10)), drop=0), name="global-position"),
        "P = 10 %": replace(presets.fastav(Keep(audio=Tokens(10)), drop=0.1), name="drop-10"),
        "P = 20 %": PRESET,
        "P = 30 %": replace(presets.fastav(Keep(audio=Tokens(10)), drop=0.3), name="drop-30"),
    }


def test_settings_of_another_plan_join_the_sweeps():
    other = presets.fastav(Keep(media=Before(750)), start=12, drop=0.25, exempt_text=False, name="mine")
    drops, starts = by_label(other, "drop"), by_label(other, "start")
    assert list(drops)[1:] == ["P = 0 %", "P = 10 %", "P = 20 %", "P = 25 %", "P = 30 %"]
    assert list(starts)[1:] == ["layer 7", "layer 10", "layer 12", "layer 14", "layer 17", "layer 21"]
    assert drops["P = 25 %"].is_original
    assert starts["layer 12"].is_original
    assert drops["P = 25 %"].plan == replace(other, name="fastav")
    assert drops["P = 30 %"].plan.steps[1].keep == Keep(all=Share(0.7))


def test_random_tokens_cost_the_same_as_chosen_ones():
    layout = layout_of(prompt(seed=1)[0])
    tokens = {name: by_label(SMALL, "global", 6)[name].plan.tokens(layout, 6) for name in GLOBAL}
    assert set(tokens.values()) == {(36, 36, 36, 20, 20, 20)}
    assert set(FINE) < set(GLOBAL)


GLOBAL_CUT, FINE_CUT = PRESET.steps


@pytest.mark.parametrize(
    "plan",
    [
        presets.NONE,
        presets.trim(),
        presets.plus(),
        presets.fastav(Keep(audio=Tokens(10)), drop=0),
        Plan((FINE_CUT, GLOBAL_CUT)),
        Plan((replace(GLOBAL_CUT, layers="14..15"), FINE_CUT)),
        Plan((replace(GLOBAL_CUT, keep=Keep(media=Share(0.4))), replace(FINE_CUT, layers="10.."))),
        Plan((GLOBAL_CUT, replace(FINE_CUT, options={"lowest": True}))),
        Plan((GLOBAL_CUT, replace(FINE_CUT, cache_only=True))),
        Plan((replace(GLOBAL_CUT, earlier_caches=True), FINE_CUT)),
    ],
)
def test_what_is_no_plan_of_fastav_is_refused(plan):
    with pytest.raises(PlanError, match="cannot be ablated: it is not one cut by position"):
        tables(plan, DEPTH, ["global"])


@pytest.mark.parametrize(
    "fine",
    [
        [Step(layers="18", method="last-query", keep=Keep(media=Share(0.26)))],
        [replace(FINE_CUT, layers="16..")],
        [replace(FINE_CUT, layers="15..20"), replace(FINE_CUT, layers="21..")],
        [replace(FINE_CUT, keep=Keep(media=Tokens(100)))],
        [replace(FINE_CUT, keep=Keep(audio=Share(0.8), video=Share(0.7)))],
    ],
)
@pytest.mark.parametrize("name", ["start", "drop"])
def test_fine_cuts_without_one_p_are_not_swept(fine, name):
    plan = Plan((GLOBAL_CUT, *fine))
    assert len(tables(plan, DEPTH, ["global", "fine"])) == 2
    with pytest.raises(PlanError, match="neither a start layer nor a P to sweep"):
        tables(plan, DEPTH, [name])


def test_names_of_tables():
    assert [table.name for table in tables(PRESET, DEPTH)] == list(TABLES)
    assert [table.name for table in tables(PRESET, DEPTH, ["drop", "fine", "drop"])] == ["drop", "fine"]
    with pytest.raises(UnknownName, match=r"no table is called 'gobal' \(did you mean 'global'"):
        tables(PRESET, DEPTH, ["fine", "gobal"])
    with pytest.raises(PlanError, match="no table is given"):
        tables(PRESET, DEPTH, [])
    with pytest.raises(PlanError, match="do not exist in a decoder of 12 layers"):
        tables(presets.fastav(Keep(audio=Tokens(10)), start=14), 12)
