"""FLOPs and KV bytes: the paper's column, and PyTorch's own count of a real run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from fastav.budgets import Tokens
from fastav.cache_argument import as_argument
from fastav.engines.transformers import prune
from fastav.errors import PlanError
from fastav.flops import DecoderShape, kv_bytes, paper_flops, prefill_flops
from fastav.layout import Layout, Modality
from fastav.plan import Keep, Plan
from fastav.presets import fastav
from fastav.registry import MODELS
from support.tiny import TinyAdapter, prompt, tiny_model

ROOT = Path(__file__).parents[2]

VIDEOLLAMA2 = DecoderShape(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128, vocab=152064)
TINY = DecoderShape(layers=6, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocab=64)


@pytest.mark.parametrize(("drop", "paper", "ours"), [(0, 65, 65.6), (0.1, 59, 59.0), (0.2, 56, 55.9), (0.3, 54, 54.4)])
def test_the_papers_column_is_reproduced(drop, paper, ours):
    parts = [(Modality.TEXT, 14), (Modality.VIDEO, 676), (Modality.AUDIO, 1496), (Modality.TEXT, 30)]
    layout = Layout.join(Layout.of(m, n) for m, n in parts)
    tokens = fastav(Keep(audio=Tokens(10)), drop=drop).tokens(layout, 28)
    ratio = 100 * paper_flops(VIDEOLLAMA2, tokens) / paper_flops(VIDEOLLAMA2, [len(layout)] * 28)
    assert ratio == pytest.approx(ours, abs=0.05)
    assert abs(ratio - paper) < 1


@pytest.mark.parametrize("plan", [Plan(), fastav(Keep(audio=Tokens(4), video=Tokens(14)))])
def test_the_exact_count_is_what_pytorch_counts(plan):
    model, ids = tiny_model("eager"), prompt()  # of a fused kernel on the CPU PyTorch counts nothing
    tokens = plan.tokens(TinyAdapter().layouts(model.config, {"input_ids": ids})[0], 6)
    with torch.no_grad(), prune(model, plan, adapter=TinyAdapter()), FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=1)
    counted = counter.get_total_flops()
    scored = sum(2 * 64 * n for n in tokens[3:-1]) if plan.steps else 0
    rope = counted - scored - prefill_flops(TINY, tokens, causal=False)
    assert 0 <= rope <= 2 * 8 * ids.shape[1]  # the angles: an outer product of positions and frequencies


def test_the_causal_count_is_the_lower_triangle():
    one = prefill_flops(TINY, [5], causal=False) - prefill_flops(TINY, [5], causal=True)
    assert one == 4 * 64 * (25 - 15)


def test_kv_bytes_are_what_a_cache_holds():
    model, ids, plan = tiny_model(), prompt(), fastav(Keep(audio=Tokens(4)))
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), prune(model, plan, adapter=TinyAdapter()):
        model(ids, **as_argument(cache))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    layout = TinyAdapter().layouts(model.config, {"input_ids": ids})[0]
    assert held == kv_bytes(TINY, plan.tokens(layout, 6), itemsize=4)


def test_a_shape_must_be_positive():
    with pytest.raises(PlanError, match="heads must be positive"):
        DecoderShape(layers=1, hidden=1, intermediate=1, heads=0, kv_heads=1, head_dim=1, vocab=1)


def test_a_query_is_counted_with_the_keys_of_its_window():
    windowed = replace(TINY, windows=(0, 3, 0, 3, 0, 3))
    pairs = sum(min(query + 1, 3) for query in range(10))
    saved = prefill_flops(TINY, [10] * 6) - prefill_flops(windowed, [10] * 6)
    assert saved == 3 * 4 * 64 * (55 - pairs)
    assert kv_bytes(TINY, [10] * 6) - kv_bytes(windowed, [10] * 6) == 3 * 8 * 2 * 2 * 16 * 2  # two of the ten are held
    assert prefill_flops(windowed, [2] * 6) == prefill_flops(TINY, [2] * 6)


def test_layers_that_share_keys_compute_and_hold_none():
    shared = replace(TINY, kv_layers=4)
    assert kv_bytes(shared, [10] * 6) == kv_bytes(TINY, [10] * 6) * 4 // 6
    projections = 2 * 64 * (2 * 2 * 16)
    assert prefill_flops(TINY, [10] * 6) - prefill_flops(shared, [10] * 6) == 2 * 10 * projections


@pytest.mark.parametrize("changes", [{"windows": (1, 2)}, {"windows": (-1,) * 6}, {"kv_layers": 0}, {"kv_layers": 7}])
def test_windows_and_shared_keys_must_fit_the_layers(changes):
    with pytest.raises(PlanError, match="of 6 layers"):
        replace(TINY, **changes)


@pytest.mark.parametrize(("model", "name"), [("qwen2-5-omni", "Qwen2.5-Omni-7B"), ("qwen3-omni", "Qwen3-Omni-30B")])
def test_scores_of_a_layer_about_to_run_cost_what_the_docs_say(model, name):
    """Queries, keys and values once more, over all of a layer's matrices."""
    shape = MODELS[model]().shape(MODELS[model]().config())
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    own = shape.hidden * (queries + 2 * keys)
    layer = own + shape.hidden * queries + 3 * shape.hidden * shape.intermediate
    text = " ".join((ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split())
    assert f"{round(100 * own / layer)} % " in text.split(name)[0][-40:]
