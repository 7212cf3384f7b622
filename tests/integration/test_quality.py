"""The quality gate: what the embedded model answers to 300 held-out questions, unpruned and with `fastav-plus`."""

import pytest
import torch

from fastav.engines.transformers import prune
from fastav.flops import prefill_flops
from fastav.models.tiny import TinyAdapter
from fastav.presets import NONE
from fastav.registry import TASKS

ADAPTER = TinyAdapter()
SCENES, BATCH = 20, 50  # one question of each of 15 kinds about a scene


@pytest.fixture(scope="module")
def asked():
    """The model, its processor, the task, and its questions in batches of like ones."""
    model, processor = ADAPTER.load(ADAPTER.checkpoint, dtype=torch.float32)
    task = TASKS["toy-world"](scenes=SCENES)
    samples = sorted(task.samples(), key=lambda sample: (sample.family == "caption", len(sample.question)))
    assert len(samples) == 300
    batches = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
    prepared = [ADAPTER.prepare(processor, [sample.request() for sample in batch]) for batch in batches]
    return model, processor, task, list(zip(batches, prepared, strict=True))


def score(asked, plan):
    """Mean score, and FLOPs of the prefills against unpruned."""
    model, processor, task, batches = asked
    shape, scores, flops = ADAPTER.shape(model.config), [], []
    for samples, prepared in batches:
        longest = 16 if any(sample.family == "caption" for sample in samples) else 4
        with torch.inference_mode(), prune(model, plan, layouts=prepared.layouts, adapter=ADAPTER):
            ids = model.generate(**prepared.inputs, max_new_tokens=longest, do_sample=False)
        answers = ids[:, prepared.inputs["input_ids"].shape[1] :]
        for sample, answer, layout in zip(samples, answers, prepared.layouts, strict=True):
            scores.append(task.grade(sample, processor.tokenizer.decode(answer, skip_special_tokens=True)).score)
            tokens = plan.tokens(layout, shape.layers)
            flops.append(prefill_flops(shape, tokens) / prefill_flops(shape, [len(layout)] * shape.layers))
    return sum(scores) / len(scores), sum(flops) / len(flops)


def test_it_knows_its_world_and_fastav_plus_costs_little(asked):
    unpruned, _ = score(asked, NONE)
    pruned, flops = score(asked, ADAPTER.preset("fastav-plus"))
    assert unpruned >= 0.97
    assert pruned >= unpruned - 0.015
    assert flops <= 0.60
