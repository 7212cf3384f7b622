"""The parts of the vLLM plugin that need no vLLM: reading plans, refusals, states of requests, packed batches."""

import ast
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.budgets import Share, Tokens
from fastav.engines import vllm as package
from fastav.engines.vllm.guards import MODELS as SERVED
from fastav.engines.vllm.guards import Serving, check, check_request_plans, read
from fastav.engines.vllm.plugin import layout_features
from fastav.engines.vllm.plugin.kv_groups import MAX_GROUPS, kv_groups
from fastav.engines.vllm.plugin.layout_features import LayoutFeatures
from fastav.engines.vllm.plugin.packed_batch import BatchRow, PackedBatch, geometry
from fastav.engines.vllm.plugin.request_state import PlanRuntime
from fastav.engines.vllm.request_plans import request_plans
from fastav.errors import PlanError, UnknownName, UnsupportedModel, UnsupportedPlan
from fastav.method import Signal
from fastav.plan import Keep, Plan, Step
from fastav.registry import METHODS, MODELS

OMNI = MODELS["qwen2-5-omni"]()
CONFIG = OMNI.config()
LAYERS = CONFIG.get_text_config(decoder=True).num_hidden_layers
GLOBAL = Plan((Step(layers="middle", method="position", keep=Keep(video=Tokens(5), audio=Tokens(2))),))
IDS = [1, 2] + [CONFIG.video_token_id] * 12 + [CONFIG.audio_token_id] * 8 + [3, 4, 5]


def config_of(plan, model_config=CONFIG):
    plan_spec = plan if isinstance(plan, str) else json.loads(plan.to_json())
    pruning = read({"fastav": {"plan": plan_spec}}, model_config)
    assert pruning is not None
    return pruning


def prompt(ids=IDS):
    return {"input_ids": np.array([ids]), "video_grid_thw": np.array([[3, 4, 4]])}


def imports_of(path):
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            yield "importlib.import_module()"


def test_only_compat_imports_vllm():
    root = Path(package.__file__).parent
    files = sorted(root.rglob("*.py"))
    assert len(files) > 15
    for path in files:
        imports = set(imports_of(path))
        assert not [name for name in imports if name.partition(".")[0] == "vllm"], path
        assert "importlib.import_module()" not in imports or path == root / "compat.py"


def test_without_an_entry_there_is_no_pruning():
    assert read({}, CONFIG) is None
    assert read(None, CONFIG) is None
    assert read({"other": 1}, CONFIG) is None


@pytest.mark.parametrize("name", ["FastAV", "fast-av", "FASTAV", "fast_av"])
def test_a_name_that_means_fastav_is_not_passed_over(name):
    with pytest.raises(PlanError, match=f'has the key "{name}", which fastav does not read'):
        read({name: {"plan": "fastav"}}, CONFIG)


@pytest.mark.parametrize("entry", [None, 1, {}, {"plan": 3}, {"plan": "fastav", "more": 1}, ["plan"]])
def test_an_invalid_entry_is_refused(entry):
    with pytest.raises(PlanError):
        read({"fastav": entry}, CONFIG)


@pytest.mark.parametrize("value", [None, True, 0, 1, "names", "ANY", [], [1], {"fastav": True}, ["fastav", None]])
def test_invalid_limits_of_plans_are_refused(value):
    with pytest.raises(PlanError, match=r'"requests" of fastav cannot be .*false, a list of names'):
        read({"fastav": {"plan": "fastav", "requests": value}}, CONFIG)


NAMES = ["none", "fastav", "fastav-plus", "fastv@0.25", "fastaw", "x.json"]


@pytest.mark.parametrize(
    ("entry", "taken"),
    [
        ({}, [None, *NAMES]),
        ({"requests": "any"}, [None, *NAMES, GLOBAL.to_json(), " {"]),
        ({"requests": ["none", "fastv@0.25"]}, [None, "none", "fastv@0.25"]),
        ({"requests": False}, [None]),
    ],
)
def test_requests_name_only_plans_that_the_operator_allows(entry, taken):
    allowed = request_plans({"plan": "fastav", **entry})
    for spec in [None, *NAMES, GLOBAL.to_json(), " {"]:
        if spec in taken:
            allowed.check(spec)
        else:
            with pytest.raises(PlanError, match=r"this server (does not let|takes plans of requests by name)"):
                allowed.check(spec)


def test_a_list_of_plans_for_requests_has_plans_that_can_run():
    for name, error in (("fastaw", UnknownName), ("omnizip", UnsupportedPlan), ("mine.json", PlanError)):
        with pytest.raises(error):
            check_request_plans(config_of("fastav"), {"requests": ["none", name]})
    check_request_plans(config_of(GLOBAL), {"requests": ["none", "random@0.5", "fastav"]})


def media(mm_hash, data, offset=0):
    return SimpleNamespace(mm_hash=mm_hash, data=data, mm_position=SimpleNamespace(offset=offset))


def test_what_layouts_read_of_media_is_known_as_long_as_vllm_withholds_them(monkeypatch):
    monkeypatch.setattr(layout_features, "MIN_PRUNED", 2)
    cached = set()
    features = LayoutFeatures({"grid"}, SimpleNamespace(is_cached_item=cached.__contains__))
    for index in range(8):
        cached.add(str(index))
        assert features.of([media(str(index), {"grid": index, "pixels": 9})]) == [{"grid": index}]
    order = [media("3", None, offset=9), media("new", {"pixels": 1}, offset=1)]
    assert features.of(order) == [{}, {"grid": 3}]
    assert features.of([media("unknown", None)]) is None
    cached -= {"0", "1", "2"}
    for index in range(8, 30):
        features.of([media(str(index), {"grid": index})])
    assert features.of([media("7", None)]) == [{"grid": 7}]
    assert features.of([media("0", None)]) is None
    assert len(features._known) < 20


def test_without_a_cache_of_media_nothing_is_remembered():
    features = LayoutFeatures({"grid"}, None)
    assert features.of([media("1", {"grid": 1})]) == [{"grid": 1}]
    assert features.of([media("1", None)]) is None


def test_plans_are_named_or_written_out():
    assert config_of("fastav").plan == OMNI.preset("fastav")
    assert config_of("fastv@0.25").plan.name
    assert config_of(GLOBAL).plan == GLOBAL
    with pytest.raises(UnknownName, match="did you mean"):
        config_of("fastaw")


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(SERVED)))
def test_other_models_are_refused(name):
    with pytest.raises(UnsupportedModel, match="cannot be pruned inside vLLM yet"):
        check(config_of("fastav", MODELS[name]().config()), Serving())


@pytest.mark.parametrize("name", ["fastav", "fastav-plus", "fastav-trim", "fastv", "pyramiddrop", "none"])
def test_presets_and_recipes_are_served(name):
    check(config_of(name), Serving())


def test_plans_that_ask_for_more_are_refused():
    keep = Keep(media=Share(0.5))
    with pytest.raises(UnsupportedPlan, match="of a single layer"):
        check(config_of(Plan((Step(layers="5", method="position", keep=keep, cache_only=True),))), Serving())
    with pytest.raises(UnsupportedPlan, match="of earlier layers"):
        check(config_of(Plan((Step(layers="5", method="position", keep=keep, earlier_caches=True),))), Serving())
    with pytest.raises(UnsupportedPlan, match="method 'own-last-query' reads own-last-query, which vLLM does not"):
        check(config_of(Plan((Step(layers="5", method="own-last-query", keep=keep),))), Serving())
    with pytest.raises(UnsupportedPlan, match="method 'given' reads given"):
        check(config_of(Plan((Step(layers="5", method="given", keep=keep),))), Serving())
    with pytest.raises(UnsupportedPlan, match="method 'omnizip' reads audio-encoder"):
        check(config_of("omnizip"), Serving())
    with pytest.raises(UnsupportedPlan, match="method 'omnidrop' reads seconds"):
        check(config_of("omnidrop"), Serving())


def test_what_a_method_wants_is_refused_where_the_model_provides_it(monkeypatch):
    """A plan means the same in every engine: what the adapter provides is not left out."""
    plan = Plan((Step(layers="5", method="position", keep=Keep(media=Share(0.5))),))
    monkeypatch.setattr(METHODS["position"], "wants", frozenset({Signal.AUDIO_ENCODER}))
    with pytest.raises(UnsupportedPlan, match="method 'position' reads audio-encoder, which vLLM does not provide"):
        check(config_of(plan), Serving())
    check(config_of(plan, MODELS["video-salmonn2"]().config()), Serving())
    monkeypatch.setattr(METHODS["position"], "wants", frozenset({Signal.VISION_ENCODER}))
    with pytest.raises(UnsupportedPlan, match="method 'position' reads vision-encoder"):
        check(config_of(plan, MODELS["video-salmonn2"]().config()), Serving())


@pytest.mark.parametrize("name", [name for name in Serving.__dataclass_fields__ if name != "chunked_prefill"])
def test_ways_of_serving_are_refused(name):
    with pytest.raises(UnsupportedPlan) as error:
        check(config_of(GLOBAL), replace(Serving(), **{name: True if getattr(Serving(), name) is False else 2}))
    assert error.value.hint


ROLLOUT = Plan((Step(layers="4", method="rollout", keep=Keep(media=Share(0.5))),))


def test_plans_that_need_whole_prompts_are_refused_with_chunks():
    check(config_of(GLOBAL), Serving(chunked_prefill=True))
    check(config_of("fastav"), Serving(chunked_prefill=True))
    with pytest.raises(UnsupportedPlan, match="method 'rollout' reads the attention of all tokens"):
        check(config_of(ROLLOUT), Serving(chunked_prefill=True))
    stacked = MODELS["qwen3-vl"]().config()
    check(config_of("fastav", stacked), Serving(chunked_prefill=True))
    with pytest.raises(UnsupportedPlan, match="adds visual features in its first 3 layers"):
        check(config_of("fastv", stacked), Serving(chunked_prefill=True))


def test_methods_of_the_layout_alone_are_known():
    layout_only = {name for name, method in METHODS.items() if method().layout_only}
    assert layout_only == {"keep-first", "position", "random", "strided", "unpadded"}
    for name in METHODS:
        pruning = config_of(Plan((Step(layers="2", method=name, keep=Keep(media=Share(0.5))),)))
        assert pruning.compiled.layout_only is (name in layout_only)
        assert pruning.compiled.first_scored_layer == (LAYERS if name in layout_only else 2)


def test_a_layout_says_what_stays_in_every_piece():
    state = PlanRuntime(config_of(GLOBAL)).request_state(prompt(), torch.device("cpu"))
    half = LAYERS // 2
    assert state.prompt_kv_lens == (len(IDS),) * half + (12,) * (LAYERS - half)
    keep = state.keep_masks[half]
    assert np.flatnonzero(~keep).tolist() == [*range(7, 14), *range(16, 22)]
    for computed in range(len(IDS) + 4):
        late = int(keep[:computed].sum()) + max(0, computed - len(IDS))
        assert state.kv_len(half, computed) == late
        assert state.kv_len(0, computed) == computed


def test_where_scores_decide_only_how_many_stay_is_known():
    state = PlanRuntime(config_of("fastav")).request_state(prompt(), torch.device("cpu"))
    assert len(state.keep_masks) == config_of("fastav").compiled.first_scored_layer
    assert state.kv_len(LAYERS - 1, len(IDS) + 3) == state.prompt_kv_lens[-1] + 3
    with pytest.raises(UnsupportedPlan, match=f"only 4 of a prompt's {len(IDS)} tokens came"):
        BatchRow(state, 0, 4)
    text = PlanRuntime(config_of("fastav")).request_state({"input_ids": np.array([[1, 2, 3]])}, torch.device("cpu"))
    assert text.is_unpruned
    assert BatchRow(text, 1, 2).kv_len(LAYERS - 1) == 1


def test_a_packed_batch_keeps_what_stays_of_each_request():
    runtime = PlanRuntime(config_of(GLOBAL))
    half, hidden = LAYERS // 2, torch.arange(40.0)[:, None]
    first = BatchRow(runtime.request_state(prompt(), torch.device("cpu")), 0, 9)  # a piece of a prompt
    text = BatchRow(runtime.request_state({"input_ids": np.array([[1, 2, 3]])}, torch.device("cpu")), 0, 3)
    later = BatchRow(runtime.request_state(prompt(), torch.device("cpu")), len(IDS) + 6, 1)  # an answer's token
    batch = PackedBatch([first, text, later], torch.device("cpu"))
    assert (batch.num_tokens, batch.is_cut, batch.is_unpruned) == (13, True, False)
    left = batch.cut(half, hidden[:13])
    assert left.flatten().tolist() == [*range(7), 9, 10, 11, 12]
    assert batch.remaining().tolist() == left.flatten().int().tolist()
    where = batch.geometry(half)
    assert where.seq_lens.tolist() == [7, 3, 12 + 7]
    assert where.query_start_loc.tolist() == [0, 7, 10, 11]
    assert where.positions.tolist() == [*range(7), 0, 1, 2, 18]


def test_requests_without_tokens_are_left_out_of_a_layer():
    where = geometry([0, 2, 0, 1], [5, 7, 0, 0])
    assert where.request_indices.tolist() == [1, 3]
    assert where.batch_indices.tolist() == [0, 0, 1]
    assert where.positions.tolist() == [7, 8, 0]
    assert where.seq_lens.tolist() == [9, 1]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=48))
def test_groups_store_every_layer_in_the_fewest_slots(drops):
    kv_lens = np.cumsum(drops)[::-1].tolist()
    firsts = kv_groups(kv_lens)
    size = len(kv_lens) // len(firsts)
    assert firsts == tuple(range(0, len(kv_lens), size))
    assert len(firsts) <= MAX_GROUPS
    slots = sum(kv_lens[first] for first in firsts) * size
    assert sum(kv_lens) <= slots <= kv_lens[0] * len(kv_lens)


def test_a_plan_that_cuts_once_at_the_middle_takes_two_groups_and_fastav_four():
    assert kv_groups([100] * 28) == (0,)
    assert kv_groups([100] * 14 + [40] * 14) == (0, 14)
    assert kv_groups([100] * 14 + [int(40 * 0.8**n) for n in range(14)]) == (0, 7, 14, 21)
