"""What every recipe must do; a new one is tested without a line here, but for the tokens that it keeps."""

import inspect
from math import ceil, exp, floor

import pytest
import torch

from fastav.engines.transformers import TransformersEngine, prune
from fastav.errors import PlanError, UnknownName
from fastav.layout import MEDIA, Layout, Modality
from fastav.pipelines import plan_named
from fastav.plan import Plan
from fastav.presets import fastav
from fastav.recipes import recipe
from fastav.registry import RECIPES
from support.cases import ROWS, generate
from support.masked import masked_logits, rules_of
from support.tiny import TinyAdapter, layout_of, pad_left, tiny_model

TEXT, AUDIO, VIDEO = 8, 12, 16  # tokens of the first row
DEPTH = 6
KEPT = {  # audio and video tokens of each of the six layers, by hand from the paper's budget
    "dart": [28] * 2 + [4 + 3] * 4,
    "divprune": [2 + 2] * 6,
    "dycoke": [8 + 6] * 6,
    "evs": [4 + 12] * 6,
    "fastv": [28] * 2 + [14] * 4,
    "keep-first": [28] * 2 + [8 + 6] * 4,
    "omnizip": [7 + 9] * 6,
    "pyramiddrop": [28, 14, 14, 7, 4, 4],
    "snapkv": [28] * 6,
    "tova": [28] * 6,
    "random": [28] * 2 + [8 + 6] * 4,
    "strided": [28] * 2 + [8 + 6] * 4,
    "trim": [16 + 6] * 6,
    "vidcom2": [4 + 12] * 6,
    "vtw": [28] * 3 + [0] * 3,
}


@pytest.fixture(params=sorted(RECIPES))
def name(request):
    return request.param


def test_it_is_a_function_with_defaults_and_a_source(name):
    make = RECIPES[name]
    assert inspect.isfunction(make)
    assert "\nSource: " in inspect.getdoc(make)
    assert all(p.default is not p.empty for p in inspect.signature(make).parameters.values())
    assert make().name == name


def test_its_plan_travels_as_json_and_runs_on_any_depth(name):
    plan = RECIPES[name]()
    assert Plan.from_json(plan.to_json()) == plan
    for depth in (DEPTH, 28, 36):
        assert plan.cuts(depth) or plan.cache_cuts(depth)
    TransformersEngine.check(tiny_model().config, plan, adapter=TinyAdapter())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_keeps_what_the_plan_says(name, attention):
    plan, model = RECIPES[name](), tiny_model(attention)
    with prune(model, plan, adapter=TinyAdapter()) as pruning, torch.no_grad():
        logits = model(**pad_left(ROWS)).logits
    assert logits[:, -1].isfinite().all()
    for row, layers in zip(ROWS, pruning.tokens(), strict=True):
        assert tuple(sum(layer.values()) for layer in layers) == plan.tokens(layout_of(row[0]), DEPTH)


def test_a_row_alone_and_in_a_batch_has_the_same_logits(name):
    plan, model = RECIPES[name](), tiny_model()
    with prune(model, plan, adapter=TinyAdapter()), torch.no_grad():
        inputs = pad_left(ROWS)
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as `generate` does
        batch = model(**inputs).logits[:, -1]
        alone = torch.cat([model(row).logits[:, -1] for row in ROWS])
    assert (batch - alone).abs().max() < 1e-4


def test_it_keeps_what_its_paper_keeps(name):
    if name in KEPT:
        tokens = RECIPES[name]().tokens(layout_of(ROWS[0][0]), DEPTH)
        assert [n - TEXT for n in tokens] == KEPT[name]


@pytest.mark.parametrize("name", ["snapkv", "tova"])
def test_caches_alone_keep_half(name):
    plan = RECIPES[name]()
    assert plan.tokens(layout_of(ROWS[0][0]), DEPTH) == (TEXT + AUDIO + VIDEO,) * DEPTH
    assert plan.cache_tokens(layout_of(ROWS[0][0]), DEPTH) == (TEXT + (AUDIO + VIDEO) // 2,) * DEPTH


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_what_follows_an_at_stays_at_the_first_cut(name, share):
    if "keep" not in inspect.signature(RECIPES[name]).parameters:
        with pytest.raises(PlanError, match="no budget"):
            recipe(f"{name}@{share}")
        return
    plan = recipe(f"{name}@{share}")
    assert plan.name == f"{name}@{share}"
    layout = layout_of(ROWS[0][0])
    cut = (plan.schedule(layout, DEPTH) or plan.cache_schedule(layout, DEPTH))[0]
    there = {Modality.AUDIO: AUDIO, Modality.VIDEO: VIDEO}
    for pool, count in cut.counts.items():
        assert count == ceil(share * sum(there.get(m, 0) for m in pool))


@pytest.mark.parametrize("name", ["fastv", "fastv@0.2", "pyramiddrop"])
@pytest.mark.parametrize("row", range(2))
def test_every_step_equals_a_model_that_hides_the_same_tokens(name, row):
    plan, ids = recipe(name), ROWS[row]
    out, _ = generate(tiny_model(), {"input_ids": ids}, plan)
    answer = out.sequences[0, ids.shape[1] :]
    model = tiny_model("eager")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = masked_logits(model, model.model.layers, inputs, answer, rules_of(plan, layout_of(ids[0]), DEPTH))
    assert (torch.cat(out.logits) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("first", "last", "mean", "within"), [(0.0, 0.2, 0.302, 0.005), (0.02, 0.5, 0.2, 0.02)])
def test_omnidrop_follows_its_schedule(first, last, mean, within):
    """Of chunks of 50 audio and 288 video tokens: 30 % on average (a reproduction counts 30.2 % from 45 %) and 20 %."""
    chunks = 40
    layout = Layout.join(Layout.of(m, n * chunks) for m, n in ((Modality.AUDIO, 50), (Modality.VIDEO, 288)))
    layout = Layout.join([layout, Layout.of(Modality.TEXT, 10)])
    tokens = [n - 10 for n in RECIPES["omnidrop"](first=first, last=last).tokens(layout, 28)]
    now, expected = ceil(0.7 * 50 * chunks) + ceil(0.4 * 288 * chunks), []
    for layer in range(28):
        expected.append(now)
        drop = first + (last - first) / (1 + exp(-20 * (layer / 28 - 0.5)))
        now -= floor(now * drop) if drop >= 0.001 else 0
    assert tokens == expected
    assert sum(tokens) / 28 / (338 * chunks) == pytest.approx(mean, abs=within)


def test_a_plan_is_named_by_preset_then_file_then_recipe(tmp_path):
    class Adapter(TinyAdapter):
        presets = {"fastv": fastav(RECIPES["trim"]().steps[0].keep)}  # noqa: RUF012

    path = tmp_path / "mine.json"
    path.write_text(RECIPES["vtw"]().to_json())
    assert plan_named("fastv", Adapter()) is Adapter.presets["fastv"]
    assert plan_named("fastv", TinyAdapter()) == RECIPES["fastv"]()
    assert plan_named("none", Adapter()).steps == ()
    assert plan_named(str(path), Adapter()) == RECIPES["vtw"]()
    assert plan_named("evs@0.5", Adapter()) == recipe("evs@0.5")
    assert plan_named(recipe("evs"), Adapter()) == recipe("evs")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("fastw", UnknownName, "no plan of tiny is called 'fastw'.*did you mean 'fastv'"),
        ("pyramidrop@0.5", UnknownName, "did you mean 'pyramiddrop'"),
        ("fastv@", PlanError, "no number after the @"),
        ("fastv@half", PlanError, "write fastv@0.25"),
        ("fastv@0", PlanError, "in \\(0, 1\\]"),
        ("fastv@nan", PlanError, "in \\(0, 1\\]"),
        ("omnidrop@0.3", PlanError, "audio, video, first, last, diversity"),
        ("omnizip@0.3", PlanError, "audio, video, anchors, merged"),
    ],
)
def test_wrong_names_are_refused_in_words(text, error, message):
    with pytest.raises(error, match=message):
        plan_named(text, TinyAdapter())


def test_media_is_all_that_recipes_drop(name):
    for step in RECIPES[name]().steps:
        assert set().union(*step.keep.pools()) <= set(MEDIA)
