"""A decoding step of fixed shapes can be captured: it asks a device for nothing, and brings nothing to it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastav.engines.transformers import Decoding, prune
from fastav.engines.transformers.generation import cuda_graphs, loop
from fastav.engines.transformers.generation.buffers import LayerKV
from fastav.engines.transformers.generation.cuda_graphs import DecodeStep, patched_attention
from fastav.media import Clip
from fastav.pipelines import pipeline
from fastav.presets import NONE
from fastav.request import Request
from support import replay
from support.family import NAMES, REFERENCE, family_of, generate
from support.launches import DEVICE, WouldWait, launches
from support.ties import assert_same_greedy

MOST_LAUNCHES = 180
"""Of a step in each layer; Gemma 3n, which stacks hidden states, has most."""


def to_device(value: Any) -> Any:
    if isinstance(value, LayerKV):
        fields = {name: to_device(getattr(value, name)) for name in value.__dataclass_fields__}
        return LayerKV(**fields)
    if isinstance(value, Tensor):
        return value.to(DEVICE, torch.bfloat16 if value.is_floating_point() else value.dtype)
    return value


@pytest.fixture
def made(monkeypatch):
    """What steppers are made of."""
    calls = []

    def remember(model: Any, decoder: Any, inputs: Any, like: Any, capacities: Any, *, fixed: bool) -> DecodeStep:
        calls.append((dict(inputs), list(like), capacities))
        return DecodeStep(model, decoder, inputs, like, capacities, fixed=fixed)

    monkeypatch.setattr(loop, "DecodeStep", remember)
    monkeypatch.setattr(loop, "_steps", type(loop._steps)())
    return calls


def step_of(model: Any, adapter: Any, inputs: Any, layouts: Any, plan: Any, made: Any) -> list[str]:
    """What one step launches on a device, behind a prefill here."""
    with prune(model, plan, adapter=adapter, layouts=layouts):
        decoding = Decoding(adapter, capture=True)
        model.generate(**inputs, max_new_tokens=2, do_sample=False, custom_generate=decoding)
    ((first, given, capacities),) = made
    there = copy.deepcopy(model).to(DEVICE, torch.bfloat16)
    decoder = adapter.decoder(there)
    first, given = {name: to_device(value) for name, value in first.items()}, [to_device(one) for one in given]
    stepper = DecodeStep(there, decoder, first, given, capacities, fixed=True)
    stepper.begin(first, given, inputs["input_ids"].shape[1])
    token = torch.zeros(len(layouts), dtype=torch.long, device=DEVICE)
    with patched_attention(decoder), torch.inference_mode():
        return launches(lambda: stepper(token))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_only_where_the_adapter_says_so(name, made):
    family = family_of(name)
    case = family.model(), family.adapter, family.prepared.inputs, family.prepared.layouts, family.plan
    if family.adapter.decode_syncs:
        with pytest.raises(WouldWait):
            step_of(*case, made)
    else:
        assert len(step_of(*case, made)) < MOST_LAUNCHES * family.depth


@pytest.mark.filterwarnings("ignore:tiny does not know the word")  # in this question
@pytest.mark.parametrize("name", ["tiny", "videollama2", "video_salmonn2", "video_salmonn2_plus"])
def test_a_step_of_our_own_models_does_not_wait(name, made):
    pipe = pipeline(name if name == "tiny" else str(REFERENCE / name))
    assert not pipe.adapter.decode_syncs
    clip = Clip.open(REFERENCE / "videollama2" / "clip.mp4")
    prepared = pipe.adapter.prepare(pipe.engine.processor, [Request(clip=clip, question="What is heard?")])
    names = step_of(pipe.engine.model, pipe.adapter, prepared.inputs, prepared.layouts, pipe.plan, made)
    assert len(names) < 70 * pipe.adapter.shape(pipe.engine.model.config).layers


# --- replayed, by a stand-in for CUDA graphs


@pytest.fixture
def _replaying(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CAPTURING", {"cpu"})
    monkeypatch.setattr(cuda_graphs, "record", replay.record)
    monkeypatch.setattr(loop, "_steps", type(loop._steps)())


@pytest.mark.usefixtures("_replaying")
@pytest.mark.parametrize("name", NAMES)
def test_replayed_steps_say_what_generate_says(name):
    family = family_of(name)
    if family.adapter.decode_syncs:
        pytest.skip("its steps are not captured")
    model = family.model()
    for rows in ([0, 1], [1], [0]):
        prepared = family.prepare(*(family.clips[row] for row in rows))
        for plan in (NONE, family.plan, NONE):
            with prune(model, plan, adapter=family.adapter, layouts=prepared.layouts):
                found = generate(model, prepared, custom_generate=Decoding(family.adapter))
            assert_same_greedy(found, family.generate(plan, rows), 2e-4)
    steppers = loop._steps[model].values()
    assert all(stepper._graph is not None for stepper in steppers)
    assert len(steppers) < 9  # some served more than one answer
