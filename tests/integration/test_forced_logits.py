"""Logits along given answers equal those of decoding, and the mask-based oracle's on the same answers."""

import importlib
from functools import cache

import numpy as np
import pytest
import torch

import fastav
from fastav.adapter import ModelAdapter, adapter_for
from fastav.budgets import Share
from fastav.engines.transformers import Decoding, TransformersEngine, prune
from fastav.errors import FastAVError, UnsupportedPlan
from fastav.evaluate.divergence import kl_divergence
from fastav.media import Clip
from fastav.plan import Keep, Plan
from fastav.presets import NONE
from fastav.request import Request
from support.masked import masked_logits, rules_of

STEPS = 5
FAMILIES = ["gemma3n", "qwen2_5_omni", "qwen3_vl"]  # windows and shared keys; M-RoPE; DeepStack


@cache
def engine_of(name: str) -> tuple[TransformersEngine, Plan, tuple[Request, Request]]:
    """An engine, a plan that prunes, and two requests of different length."""
    if name == "tiny":
        engine = fastav.pipeline("tiny", device="cpu").engine
        assert isinstance(engine, TransformersEngine)
        plan = engine.adapter.preset("fastav")
    else:
        module = importlib.import_module(f"support.families.{name}")
        model, processor = module.build("sdpa")
        adapter: ModelAdapter = adapter_for([type(model).__name__])
        engine = TransformersEngine(model, processor, adapter)
        plan = getattr(module, "PLAN", fastav.presets.fastav(Keep(media=Share(0.6)), drop=0.2))
    return engine, plan, requests_for(engine.adapter)


def requests_for(adapter: ModelAdapter) -> tuple[Request, Request]:
    make = np.random.default_rng(0)
    requests = []
    for frames, question in ((24, "what sound do you hear?"), (24, "which color moves?")):
        clip = Clip.from_arrays(
            frames=make.integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8),
            fps=6,
            waveform=make.uniform(-0.5, 0.5, 64_000).astype(np.float32) if adapter.supports_audio else None,
            sample_rate=16_000 if adapter.supports_audio else None,
        )
        requests.append(Request(clip=clip, question=question))
    return requests[0], requests[1]


@pytest.fixture(params=["tiny", *FAMILIES])
def case(request):
    return engine_of(request.param)


@pytest.fixture
def answers(case):
    """Tokens that no model here would choose: the answer is given, not generated."""
    engine, _, _ = case
    vocabulary = engine.model.get_output_embeddings().weight.shape[0]
    letters = [number for number in range(30, 60) if number < vocabulary]
    return [letters[:STEPS], letters[7:9]]


def test_they_equal_the_mask_based_oracle(case, answers):
    engine, plan, requests = case
    layers = engine.adapter.decoder(engine.adapter.language_model(engine.model)).layers
    found = engine.forced_logits(requests, plan, answers)
    for request, answer, logits in zip(requests, answers, found, strict=True):
        assert logits.shape[0] == len(answer) + 1
        alone = engine.adapter.prepare(engine.processor, [request])
        rules = rules_of(plan, alone.layouts[0], len(layers))
        with_next = torch.tensor([*answer, 0])  # the oracle gives what leads to each token
        expected = masked_logits(engine.model, layers, alone.inputs, with_next, rules)
        assert (logits - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


@pytest.mark.parametrize("pruned", [False, True])
def test_they_equal_the_logits_of_decoding(case, pruned):
    engine, plan, requests = case
    chosen = plan if pruned else NONE
    (answer,) = engine.generate(requests[:1], chosen, max_new_tokens=STEPS)
    prepared = engine.adapter.prepare(engine.processor, requests[:1])
    with prune(engine.model, chosen, layouts=prepared.layouts, adapter=engine.adapter):
        out = engine.model.generate(
            **prepared.inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            custom_generate=Decoding(engine.adapter),
        )
    (logits,) = engine.forced_logits(requests[:1], chosen, [answer.token_ids])
    decoded = torch.cat(out.logits)[: len(answer.token_ids) + 1]
    assert len(decoded) >= 1
    assert (logits[: len(decoded)] - decoded).abs().max() < 1e-5 * max(1, decoded.abs().max())


def test_a_batch_gives_what_each_row_does(case, answers):
    engine, plan, requests = case
    together = engine.forced_logits(requests, plan, answers)
    for request, answer, logits in zip(requests, answers, together, strict=True):
        (alone,) = engine.forced_logits([request], plan, [answer])
        assert (logits - alone).abs().max() < 1e-4 * max(1, alone.abs().max())
        assert kl_divergence(alone, logits).max() < 1e-6


def test_keeping_everything_diverges_by_no_more_than_rounding(case, answers):
    """Logits that differ by at most d give a divergence of at most d * d / 2: here d is 1e-4 of the largest logit."""
    engine, _, requests = case
    first, again = (engine.forced_logits(requests[:1], NONE, answers[:1])[0] for _ in range(2))
    bound = (1e-4 * float(first.abs().max())) ** 2 / 2
    assert kl_divergence(first, again).max() <= max(bound, 1e-12)


def test_an_empty_answer_has_the_logits_of_the_prefill():
    engine, plan, requests = engine_of("tiny")
    (logits,) = engine.forced_logits(requests[:1], plan, [[]])
    (answer,) = engine.generate(requests[:1], plan, max_new_tokens=1)
    assert logits.shape[0] == 1
    assert logits[0].argmax() == (answer.token_ids or [engine.model.generation_config.eos_token_id])[0]


def test_nothing_stays_on_the_model():
    engine, plan, requests = engine_of("tiny")
    before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in engine.model.named_modules()}
    engine.forced_logits(requests, plan, [[3, 4], [5]])
    after = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in engine.model.named_modules()}
    assert after == before


def test_answers_that_are_too_long_are_refused():
    engine, plan, requests = engine_of("tiny")
    most = engine.model.config.get_text_config(decoder=True).max_position_embeddings
    with pytest.raises(FastAVError, match="exceed the model's"):
        engine.forced_logits(requests[:1], plan, [[3] * most])


def test_every_request_has_its_answer():
    engine, plan, requests = engine_of("tiny")
    with pytest.raises(FastAVError, match="1 answer for 2 requests"):
        engine.forced_logits(requests, plan, [[3]])


def test_an_engine_without_logits_says_so():
    from fastav.engine import Engine

    class Silent(Engine):
        device = dtype = ""
        check = load = generate = None

    with pytest.raises(UnsupportedPlan, match="Silent does not expose its logits"):
        Silent().forced_logits([], NONE, [])
