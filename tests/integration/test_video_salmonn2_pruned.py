"""video-SALMONN 2 on real mp4s, pruned: the presets against the oracle, and the pipeline end to end."""

from pathlib import Path

import pytest
import torch

import fastav
from fastav.adapter import Request, Use
from fastav.engines.transformers import TransformersEngine, prune
from fastav.layout import MEDIA
from fastav.media import Clip
from fastav.models.video_salmonn2 import VideoSalmonn2Adapter
from support.oracle import drop_lowest, keep_only_first, oracle_logits

BUNDLE = Path(__file__).parents[1] / "reference" / "video_salmonn2"
REQUESTS = (  # another length each, of frames and of sound
    ("clip_short.mp4", "What moves, and what sound is heard?", Use.BOTH),
    ("clip_long.mp4", "What?", Use.BOTH),
    ("clip_short.mp4", "What colour?", Use.VIDEO),
    ("clip_long.mp4", "What is heard?", Use.AUDIO),
)
ARGUMENTS = ("input_ids", "pixel_values_videos", "input_features", "audio_index", "piece_index")
STEPS = 4


@pytest.fixture(scope="module")
def loaded():
    adapter = VideoSalmonn2Adapter()
    model, processor = adapter.load(str(BUNDLE), dtype=torch.float32)
    return adapter, model, processor


@pytest.fixture(scope="module")
def requests():
    return [Request(clip=Clip.open(BUNDLE / name), question=question, use=use) for name, question, use in REQUESTS]


def rules_of(layout, name, depth):
    modality = torch.from_numpy(layout.modality.copy())
    media = torch.isin(modality, torch.tensor(MEDIA, dtype=torch.int8))
    if name == "fastav-trim":
        padding = torch.from_numpy(layout.padding.copy())
        return {0: lambda score, hide: hide | padding}
    early = int(((layout.frame >= 0) & (layout.frame < 4)).sum())
    rules = {depth // 2: keep_only_first(media, early)}
    return rules | {layer: drop_lowest(media, 0.2) for layer in range(depth // 2 + 1, depth)}


@pytest.mark.parametrize("name", ["fastav", "fastav-trim"])
def test_a_batch_of_all_modalities_equals_the_oracle(loaded, requests, name):
    adapter, model, processor = loaded
    prepared, plan = adapter.prepare(processor, requests), adapter.preset(name)
    inputs = dict(prepared.inputs)
    with torch.inference_mode():
        merged = model.embed(*(inputs[argument] for argument in ARGUMENTS))
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


def test_pipeline_answers_with_its_evidence():
    pipe = fastav.pipeline(str(BUNDLE), plan="fastav")
    pieces: list[str] = []
    question = "Please describe the video and its audio."
    answer = pipe(BUNDLE / "clip_short.mp4", question, max_new_tokens=12, on_text=pieces.append)
    plain = pipe(BUNDLE / "clip_short.mp4", question, max_new_tokens=12, plan="none")
    assert plain.token_ids == (161, 181, 151, 196, 278, 230, 29, 199, 199, 199, 199, 277)
    assert "".join(pieces).strip() == answer.text
    assert answer.prompt_tokens == {"text": 99, "audio": 63, "video": 140}
    # the first four of seven frames: 20 tokens of picture and 9 of sound each; then a fifth of them goes
    assert [sum(layer.values()) for layer in answer.tokens_per_layer] == [302, 302, 99 + 116, 99 + 93]
    assert answer.tokens_per_layer[2] == {"text": 99, "audio": 36, "video": 80}
    assert plain.flops.ratio == plain.kv_bytes.ratio == 1.0
    assert 0.5 < answer.flops.ratio < 0.9
    assert set(answer.seconds) == {"media", "encode", "prefill", "decode"}
    assert all(seconds > 0 for seconds in answer.seconds.values())


def test_trimming_drops_the_silence_that_fills_a_piece():
    pipe = fastav.pipeline(str(BUNDLE), plan="fastav-trim")
    answer = pipe(BUNDLE / "clip_short.mp4", "What?", max_new_tokens=2)
    assert answer.prompt_tokens["audio"] == 63
    # 6.4 s are 13 tokens of sound; one of them is there twice, for 63 are spread from 60
    assert {layer["audio"] for layer in answer.tokens_per_layer} == {14}
    assert {layer["video"] for layer in answer.tokens_per_layer} == {140}


def test_the_engine_answers_a_batch_as_it_answers_one_by_one(loaded, requests):
    adapter, model, processor = loaded
    engine = TransformersEngine(model, processor, adapter)
    plan = adapter.preset("fastav")
    together = engine.generate(requests, plan, max_new_tokens=8)
    alone = [engine.generate([request], plan, max_new_tokens=8)[0] for request in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.tokens_per_layer for answer in together] == [answer.tokens_per_layer for answer in alone]
