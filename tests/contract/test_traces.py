"""What `Engine.trace` says of attention and rollout, against the maps that the model's own eager code returns."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from fastav.engines.transformers import TransformersEngine
from fastav.pipelines import pipeline
from fastav.presets import NONE
from fastav.pruning.device_layout import question_mask
from fastav.trace import QUERIES
from support.family import NAMES, family_of
from support.toy import scene_request

SLICED = {"gemma3n", "gemma4", "gemma4_bidirectional"}
"""Models whose last layers may run on the prompt's last tokens alone."""


def maps(model, layers, inputs):
    """The attention map of every layer, mean over heads, in float64.

    Where a layer runs on the prompt's last tokens alone, the others stay what they are: each attends to itself.
    """
    found, before = [], model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with ExitStack() as stack, torch.no_grad():
            for layer in layers:
                hook = layer.self_attn.register_forward_hook(lambda module, args, output: found.append(output[1][0]))
                stack.callback(hook.remove)
            model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    whole = torch.eye(found[0].shape[-1], dtype=torch.float64)
    return [torch.cat([whole[: -layer.shape[1]], layer.double().mean(0)]) for layer in found]


def dense(attentions, layout, alpha):
    """Rows of the attention and of the rollout of every layer, as products of whole maps."""
    n = len(layout)
    asked = torch.from_numpy(question_mask(layout)).double()
    starts = torch.stack([torch.eye(n, dtype=torch.float64)[-1], asked / asked.sum(), torch.full((n,), 1 / n)])
    product, attention, rollout = torch.eye(n, dtype=torch.float64), [], []
    for layer in attentions:
        product = (alpha * layer + (1 - alpha) * torch.eye(n)) @ product
        attention.append(starts.double() @ layer)
        rollout.append(starts.double() @ product)
    return torch.stack(attention, 1).numpy(), torch.stack(rollout, 1).numpy()


def otherwise_rounded(layers):
    """A context in which every layer is off by as much as it may be on another CPU.

    From one residual to the next a layer rounds some sixteen times: norms, projections, scores, weights, gates, sums.
    """
    random = torch.Generator().manual_seed(0)

    def moved(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        noise = torch.empty_like(hidden).normal_(generator=random) * hidden.square().mean(-1, keepdim=True).sqrt()
        hidden = hidden + 16 * 2**-24 * noise
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    stack = ExitStack()
    for layer in layers:
        stack.callback(layer.register_forward_hook(moved).remove)
    return stack


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_is_that_of_the_dense_maps(name):
    """Rounding grows from layer to layer, in a model of random weights by powers of ten: so the maps say how far."""
    family = family_of(name)
    engine = TransformersEngine(family.model(), family.processor, family.adapter)
    trace = engine.trace(family.clips[0], NONE, alpha=0.6)
    prepared = family.prepare(family.clips[0])
    layers = family.adapter.decoder(family.model()).layers
    expected = dense(maps(family.model(), layers, prepared.inputs), trace.layout, 0.6)
    with otherwise_rounded(layers):
        others = dense(maps(family.model(), layers, prepared.inputs), trace.layout, 0.6)
    rows = slice(0, 1) if name in SLICED else slice(None)
    assert trace.attention.shape == (len(QUERIES), family.depth, len(trace.layout))
    for ours, theirs, other in zip((trace.attention, trace.rollout), expected, others, strict=True):
        off, error = (np.abs(part - theirs)[rows].max((0, 2)) for part in (ours, other))
        assert (off <= 2e-6 + 8 * np.maximum.accumulate(error)).all()
        assert error.max() < 1e-3  # a criterion that everything meets would be none
    assert trace.rollout.sum(-1) == pytest.approx(1, abs=1e-4)


def test_a_trace_of_the_embedded_model_is_that_of_its_dense_maps():
    pipe, request = pipeline("tiny"), scene_request()
    trace = pipe.engine.trace(request, NONE)
    prepared = pipe.adapter.prepare(pipe.engine.processor, [request])
    expected = dense(maps(pipe.engine.model, pipe.engine.model.model.layers, prepared.inputs), trace.layout, 0.5)
    assert np.abs(trace.attention - expected[0]).max() < 1e-4
    assert np.abs(trace.rollout - expected[1]).max() < 1e-4


def test_under_a_plan_what_went_has_no_weight_in_later_layers():
    pipe = pipeline("tiny")
    trace = pipe.engine.trace(scene_request(), pipe.plan)
    assert [layer for layer, _ in trace.selections] == list(range(6, 12))
    for layer, kept in trace.selections:
        gone = np.setdiff1d(np.arange(len(trace.layout)), kept)
        assert (trace.attention[:, layer, gone] == 0).all()
        assert trace.attention[:, layer].sum(-1) == pytest.approx(1, abs=1e-4)
    kept = {layer: len(kept) for layer, kept in trace.selections}
    assert [kept[layer] for layer in range(6, 12)] == list(pipe.plan.tokens(trace.layout, 12)[6:])
