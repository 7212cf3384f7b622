"""What an answer tells of its cost, against what our own families' caches hold; test_families.py has the others."""

from functools import cache
from pathlib import Path

import pytest
import torch

from fastav.engines.transformers import TransformersEngine
from fastav.media import Clip
from fastav.recipes import recipe
from fastav.registry import MODELS
from fastav.request import Request, Use
from support.costs import answered, cached_alone

REFERENCE = Path(__file__).parents[1] / "reference"
CLIPS = {"videollama2": "clip.mp4", "video-salmonn2": "clip_short.mp4", "video-salmonn2-plus": "clip.mp4"}


@cache
def engine_of(name):
    adapter = MODELS[name]()
    model, processor = adapter.load(str(REFERENCE / name.replace("-", "_")), dtype=torch.float32)
    return TransformersEngine(model, processor, adapter)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("plan", ["none", "fastav", "fastav-trim", "caches", "omnizip"])
def test_told_kv_bytes_are_what_the_cache_holds(name, plan):
    engine = engine_of(name)
    if plan == "omnizip" and engine.adapter.audio_attention() is None:
        pytest.skip("its encoder's attention is not told")
    named = {"caches": cached_alone(engine.adapter, engine.model.config), "omnizip": recipe("omnizip")}
    chosen = named[plan] if plan in named else engine.adapter.preset(plan)
    clip = Clip.open(REFERENCE / name.replace("-", "_") / CLIPS[name])
    requests = [Request(clip=clip, question="What is heard?"), Request(clip=clip, question="Who?", use=Use.VIDEO)]
    together, _ = answered(engine, requests, chosen)
    for request, answer in zip(requests, together, strict=True):
        (alone,), held = answered(engine, [request], chosen)
        assert alone.kv_bytes.pruned == held
        assert answer.kv_bytes == alone.kv_bytes
        assert alone.kv_bytes.ratio == 1 if plan == "none" else alone.kv_bytes.ratio <= 1
