"""Whole Qwen-Omni models, talker and all: text through the pruned thinker, speech refused while pruning."""

import importlib

import numpy as np
import pytest
import torch

from fastav.adapter import adapter_for
from fastav.engines.transformers import prune
from fastav.errors import UnsupportedPlan
from fastav.media import Clip
from fastav.request import Request

TEXT_ONLY = {"qwen2_5_omni": {"generation_mode": "text", "speaker": "Nobody"}, "qwen3_omni": {"return_audio": False}}


@pytest.fixture(params=sorted(TEXT_ONLY))
def case(request):
    """The whole model, a prompt about a clip with sound, and how to ask for text."""
    module = importlib.import_module(f"support.families.{request.param}")
    whole, (_, processor) = module.full_model(), module.build()
    if hasattr(whole, "speaker_map"):
        whole.speaker_map["Nobody"] = {}
    adapter = adapter_for([type(whole).__name__])
    make = np.random.default_rng(0)
    clip = Clip.from_arrays(
        frames=make.integers(0, 256, (30, 24, 32, 3), dtype=np.uint8),
        fps=10,
        waveform=make.uniform(-0.5, 0.5, 48_000).astype(np.float32),
        sample_rate=16_000,
    )
    prepared = adapter.prepare(processor, [Request(clip=clip, question="What?")])
    return whole, adapter, prepared, TEXT_ONLY[request.param] | {"thinker_max_new_tokens": 5}


def answer(whole, prepared, options):
    out = whole.generate(**prepared.inputs, **options)
    return out.sequences if hasattr(out, "sequences") else out


def text_of(result):
    return result[0] if isinstance(result, tuple) else result


def test_text_is_what_the_pruned_thinker_alone_writes(case):
    whole, adapter, prepared, options = case
    plain = text_of(answer(whole, prepared, options))
    with prune(whole, "fastav", layouts=prepared.layouts) as pruning:
        pruned = text_of(answer(whole, prepared, options))
    assert pruning.model is whole.thinker
    assert sum(pruning.tokens()[0][-1].values()) < len(prepared.layouts[0])
    with prune(whole.thinker, "fastav", layouts=prepared.layouts, adapter=adapter):
        alone = whole.thinker.generate(**prepared.inputs, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(pruned, alone)
    assert torch.equal(text_of(answer(whole, prepared, options)), plain)
    assert not torch.equal(pruned, plain)


def test_speech_is_refused_in_words_and_only_while_pruning(case):
    whole, _, prepared, options = case
    before = dict(vars(whole))
    speaking = {name: value for name, value in options.items() if name not in ("return_audio", "generation_mode")}
    with prune(whole, "fastav", layouts=prepared.layouts), pytest.raises(UnsupportedPlan, match="the talker reads"):
        answer(whole, prepared, speaking)
    assert dict(vars(whole)) == before
    assert whole.has_talker
