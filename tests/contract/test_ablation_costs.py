"""The ablations of every model family: equal costs where a table compares strategies, and a plan for the engine."""

import importlib
import pkgutil

import numpy as np
import pytest

from fastav.ablations import TABLES, plans, tables
from fastav.adapter import adapter_for
from fastav.engines.transformers import TransformersEngine
from fastav.errors import PlanError
from fastav.media import Clip
from fastav.registry import MODELS
from fastav.request import Request
from support import families
from support.engines import accepted

FAMILIES = sorted(m.name for m in pkgutil.iter_modules(families.__path__) if not m.name.startswith("_"))

SPARSE = {"gemma3n", "gemma4"}  # whose presets cut in two layers only, and which are refused a sweep


@pytest.fixture(params=sorted(MODELS))
def adapter(request):
    return MODELS[request.param]()


def layouts(adapter):
    for seconds in (None, 20, 40):
        yield adapter.example(adapter.config(), seconds=seconds, audio=None, video=None, text=44)


def made(adapter, *names):
    depth = adapter.shape(adapter.config()).layers
    return depth, tables(adapter.preset("fastav"), depth, names)


def test_strategies_keep_as_many_tokens_as_the_preset_at_every_layer(adapter):
    depth, (coarse, fine) = made(adapter, "global", "fine")
    preset = adapter.preset("fastav")
    (start,) = preset.steps[0].layer_range(depth)
    for layout in layouts(adapter):
        expected = preset.layers(layout, depth)
        cut = [expected[min(layer, start)] for layer in range(depth)]
        for setting in coarse.settings[1:]:
            assert list(setting.plan.layers(layout, depth)) == cut, setting.label
        for setting in fine.settings[1:]:
            assert setting.plan.layers(layout, depth) == expected, setting.label
        assert sum(cut[-1].values()) < len(layout)


def test_every_plan_passes_the_engine_and_the_preset_is_among_them(adapter):
    names = ("global", "fine") if adapter.name in SPARSE else TABLES
    _, found = made(adapter, *names)
    for plan in plans(found).values():
        assert "transformers" in accepted(adapter.config(), plan)
    assert plans(found)["fastav"].steps == adapter.preset("fastav").steps
    for table in found:
        first, *rest = table.settings
        assert (first.label, first.plan.steps, first.is_original) == ("without pruning", (), False)
        assert [setting.is_original for setting in rest].count(True) == 1


@pytest.mark.parametrize("name", ["start", "drop"])
def test_sweeps_move_the_cut_or_are_refused_in_words(adapter, name):
    if adapter.name in SPARSE:
        with pytest.raises(PlanError, match=r"neither a start layer nor a P .*\(use the tables global and fine"):
            made(adapter, name)
        return
    depth, (table,) = made(adapter, name)
    costs = [sum(s.plan.tokens(layout, depth)) for layout in layouts(adapter) for s in table.settings[1:]]
    by_layout = [costs[at : at + len(table.settings) - 1] for at in range(0, len(costs), len(table.settings) - 1)]
    for one in by_layout:
        assert one == sorted(set(one), reverse=name == "drop"), "a later cut costs more, a larger P less"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_keeps_what_the_preset_does_whatever_the_strategy(name):
    """On a tiny random model of each family, by the tokens that layers really ran on."""
    module = importlib.import_module(f"support.families.{name}")
    model, processor = module.build("sdpa")
    adapter = adapter_for([type(model).__name__])
    noise = np.random.default_rng(0)
    sound = noise.uniform(-0.5, 0.5, getattr(module, "SOUND", None) or 64_000).astype(np.float32)
    clip = Clip.from_arrays(
        frames=noise.integers(0, 256, (40, 24, 32, 3), dtype=np.uint8),
        fps=10,
        waveform=sound if adapter.supports_audio else None,
        sample_rate=16_000 if adapter.supports_audio else None,
    )
    engine, request = TransformersEngine(model, processor, adapter), Request(clip=clip, question="What?")
    depth, preset = adapter.shape(model.config).layers, adapter.preset("fastav")
    (start,) = preset.steps[0].layer_range(depth)

    def ran(plan):
        (answer,) = engine.generate([request], plan, max_new_tokens=1)
        return [sum(layer.values()) for layer in answer.tokens_per_layer]

    expected = ran(preset)
    assert expected[-1] < expected[0]
    coarse, fine = tables(preset, depth, ["global", "fine"])
    for setting in coarse.settings[1:]:
        assert ran(setting.plan) == [expected[min(layer, start)] for layer in range(depth)], setting.label
    for setting in fine.settings[1:]:
        assert ran(setting.plan) == expected, setting.label
