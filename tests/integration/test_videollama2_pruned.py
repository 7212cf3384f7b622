"""VideoLLaMA2 on a real mp4, pruned: the presets against the oracle, and the pipeline end to end."""

from pathlib import Path

import pytest
import torch

import fastav
from fastav.adapter import Request, Use
from fastav.engines.transformers import TransformersEngine, prune
from fastav.layout import MEDIA, Modality
from fastav.media import Clip
from fastav.models.videollama2 import VideoLlama2Adapter
from support.oracle import drop_lowest, keep_only_first, oracle_logits

BUNDLE = Path(__file__).parents[1] / "reference" / "videollama2"
QUESTIONS = {Use.BOTH: "What moves, and what sound is heard?", Use.VIDEO: "What colour?", Use.AUDIO: "What is heard?"}
STEPS = 4


@pytest.fixture(scope="module")
def loaded():
    adapter = VideoLlama2Adapter()
    model, processor = adapter.load(str(BUNDLE), dtype=torch.float32)
    return adapter, model, processor


@pytest.fixture(scope="module")
def requests():
    clip = Clip.open(BUNDLE / "clip.mp4")
    return [Request(clip=clip, question=question, use=use) for use, question in QUESTIONS.items()]


def rules_of(layout, name, depth):
    modality = torch.from_numpy(layout.modality.copy())
    media = torch.isin(modality, torch.tensor(MEDIA, dtype=torch.int8))
    if name == "fastav-trim":
        padding = torch.from_numpy(layout.padding.copy())
        return {0: lambda score, hide: hide | padding}
    rules = {depth // 2: keep_only_first(modality == int(Modality.AUDIO), 10)}
    return rules | {layer: drop_lowest(media, 0.2) for layer in range(depth // 2 + 1, depth)}


@pytest.mark.parametrize("name", ["fastav", "fastav-trim"])
def test_a_batch_of_all_modalities_equals_the_oracle(loaded, requests, name):
    adapter, model, processor = loaded
    prepared, plan = adapter.prepare(processor, requests), adapter.preset(name)
    inputs = dict(prepared.inputs)
    with torch.inference_mode():
        merged = model.model.embed(inputs["input_ids"], inputs["pixel_values_videos"], inputs["input_features"])
        with prune(model, plan) as pruning:
            out = model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        depth = len(model.model.layers)
        for row, layout in enumerate(prepared.layouts):
            n = len(layout)
            new = model.model.embed_tokens(out.sequences[row : row + 1, -STEPS:])
            embeds = torch.cat([merged[row : row + 1, -n:], new], dim=1)
            rules = rules_of(layout, name, depth)
            expected = oracle_logits(model, out.sequences[row : row + 1], n, rules, embeds)[n - 1 : -1]
            assert (torch.stack([step[row] for step in out.logits]) - expected).abs().max() < 1e-4
            assert [sum(x.values()) for x in pruning.tokens()[row]] == list(plan.tokens(layout, depth))


def test_layouts_given_and_read_off_the_ids_agree(loaded, requests):
    adapter, model, processor = loaded
    prepared = adapter.prepare(processor, requests)
    for given, read in zip(prepared.layouts, adapter.layouts(model.config, prepared.inputs), strict=True):
        assert (given.modality == read.modality).all()
        assert (given.frame == read.frame).all()
        assert (given.padding == read.padding).all()


def test_the_pipeline_answers_with_its_evidence():
    pipe = fastav.pipeline(str(BUNDLE), plan="fastav")
    pieces: list[str] = []
    answer = pipe(BUNDLE / "clip.mp4", QUESTIONS[Use.BOTH], max_new_tokens=12, on_text=pieces.append)
    plain = pipe(BUNDLE / "clip.mp4", QUESTIONS[Use.BOTH], max_new_tokens=12, plan="none")
    assert plain.token_ids == (53, 0, 144, 84, 102, 138, 24, 46, 87, 115, 113, 54)
    assert "".join(pieces).strip() == answer.text
    assert answer.prompt_tokens == {"text": 86, "audio": 1496, "video": 16}
    assert [sum(layer.values()) for layer in answer.tokens_per_layer] == [1598, 1598, 112, 107]
    assert answer.tokens_per_layer[2] == {"text": 86, "audio": 10, "video": 16}
    assert plain.flops.ratio == plain.kv_bytes.ratio == 1.0
    assert 0.5 < answer.flops.ratio < 0.6
    assert answer.kv_bytes.pruned == (1598 * 2 + 112 + 107) * 2 * 2 * 12 * 4
    assert set(answer.seconds) == {"media", "encode", "prefill", "decode"}
    assert all(seconds > 0 for seconds in answer.seconds.values())
    assert answer.peak_bytes is None or answer.peak_bytes > 1_000_000


def test_the_engine_answers_a_batch_as_it_answers_one_by_one(loaded, requests):
    adapter, model, processor = loaded
    engine = TransformersEngine(model, processor, adapter)
    plan = adapter.preset("fastav")
    together = engine.generate(requests, plan, max_new_tokens=8)
    alone = [engine.generate([request], plan, max_new_tokens=8)[0] for request in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.tokens_per_layer for answer in together] == [answer.tokens_per_layer for answer in alone]
