"""Our own families on real files, pruned: presets against the oracle, layouts, and batches against single rows."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fastav.cache_argument import as_argument
from fastav.engines.transformers import TransformersEngine, prune
from fastav.layout import MEDIA, Modality
from fastav.media import Clip
from fastav.request import Request, Use
from support.native import VIDEO_SALMONN2, VIDEO_SALMONN2_PLUS, VIDEOLLAMA2, Family, each_family
from support.oracle import conversation_logits, drop_lowest, keep_only_first, oracle_logits, turn_of

SHOWN = {  # files, questions and tracks: another length each
    VIDEOLLAMA2.name: (
        ("clip.mp4", "What moves, and what sound is heard?", Use.BOTH),
        ("clip.mp4", "What colour?", Use.VIDEO),
        ("clip.mp4", "What is heard?", Use.AUDIO),
    ),
    VIDEO_SALMONN2.name: (
        ("clip_short.mp4", "What moves, and what sound is heard?", Use.BOTH),
        ("clip_long.mp4", "What?", Use.BOTH),
        ("clip_short.mp4", "What colour?", Use.VIDEO),
        ("clip_long.mp4", "What is heard?", Use.AUDIO),
    ),
    VIDEO_SALMONN2_PLUS.name: (
        ("clip.mp4", "What moves, and what sound is heard?", Use.BOTH),
        ("clip.mp4", "What colour?", Use.VIDEO),
        ("clip.mp4", "Why?", Use.BOTH),
    ),
}
ARGUMENTS = {  # of `embed`
    VIDEOLLAMA2.name: ("input_ids", "pixel_values_videos", "input_features"),
    VIDEO_SALMONN2.name: ("input_ids", "pixel_values_videos", "input_features", "audio_index", "piece_index"),
}
STEPS = 4


@pytest.fixture(scope="module")
def loaded(family: Family) -> Any:
    return family.load()


@pytest.fixture(scope="module")
def requests(family: Family) -> list[Request]:
    return [Request(clip=Clip.open(family.tiny / file), question=q, use=use) for file, q, use in SHOWN[family.name]]


def rules_of(family, layout, name, depth):
    modality = torch.from_numpy(layout.modality.copy())
    media = torch.isin(modality, torch.tensor(MEDIA, dtype=torch.int8))
    if name == "fastav-trim":
        padding = torch.from_numpy(layout.padding.copy())
        return {0: lambda score, hide: hide | padding}
    if family is VIDEOLLAMA2:
        first = keep_only_first(modality == int(Modality.AUDIO), 10)
    else:
        first = keep_only_first(media, int(((layout.frame >= 0) & (layout.frame < 4)).sum()))
    rules = {depth // 2: first}
    return rules | {layer: drop_lowest(media, 0.2) for layer in range(depth // 2 + 1, depth)}


@pytest.mark.parametrize("family", [VIDEOLLAMA2, VIDEO_SALMONN2], ids=lambda family: family.name, scope="module")
@pytest.mark.parametrize("name", ["fastav", "fastav-trim"])
def test_a_batch_of_all_modalities_equals_the_oracle(family, loaded, requests, name):
    adapter, (model, processor) = family.adapter, loaded
    prepared, plan = adapter.prepare(processor, requests), adapter.preset(name)
    inputs = dict(prepared.inputs)
    with torch.inference_mode():
        embed = model.model.embed if family is VIDEOLLAMA2 else model.embed
        merged = embed(*(inputs[argument] for argument in ARGUMENTS[family.name]))
        with prune(model, plan) as pruning:
            out = model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        depth = len(model.model.layers)
        for row, layout in enumerate(prepared.layouts):
            n = len(layout)
            new = model.model.embed_tokens(out.sequences[row : row + 1, -STEPS:])
            embeds = torch.cat([merged[row : row + 1, -n:], new], dim=1)
            rules = rules_of(family, layout, name, depth)
            expected = oracle_logits(model, out.sequences[row : row + 1], n, rules, embeds)[n - 1 : -1]
            assert (torch.stack([step[row] for step in out.logits]) - expected).abs().max() < 1e-4
            assert [sum(x.values()) for x in pruning.tokens()[row]] == list(plan.tokens(layout, depth))


@each_family
def test_layouts_given_and_read_off_the_ids_agree(family, loaded, requests):
    model, processor = loaded
    prepared = family.adapter.prepare(processor, requests)
    for given, read in zip(prepared.layouts, family.adapter.layouts(model.config, prepared.inputs), strict=True):
        assert (given.modality == read.modality).all()
        assert (given.frame == read.frame).all()
        assert (given.padding == read.padding).all()


@each_family
def test_the_engine_answers_a_batch_as_it_answers_one_by_one(family, loaded, requests):
    engine, plan = TransformersEngine(*loaded, family.adapter), family.adapter.preset("fastav")
    together = engine.generate(requests, plan, max_new_tokens=8)
    alone = [engine.generate([request], plan, max_new_tokens=8)[0] for request in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.tokens_per_layer for answer in together] == [answer.tokens_per_layer for answer in alone]


@pytest.mark.parametrize("family", [VIDEOLLAMA2, VIDEO_SALMONN2], ids=lambda family: family.name, scope="module")
@pytest.mark.parametrize("name", ["fastav", "fastav-trim"])
@torch.inference_mode()
def test_clips_of_a_later_turn_equal_the_oracle(family, loaded, requests, name):
    """A turn about one clip, its answer, and a turn about the next."""
    adapter, (model, processor), plan = family.adapter, loaded, family.adapter.preset(name)
    embed = model.model.embed if family is VIDEOLLAMA2 else model.embed
    cache, ids, embeds, turns, found = DynamicCache(), [], [], [], []
    with prune(model, plan) as pruning:
        for request in requests[:2]:
            prepared = adapter.prepare(processor, [request])
            inputs, layout = dict(prepared.inputs), prepared.layouts[0]
            start = sum(part.shape[1] for part in ids)
            answer = inputs["input_ids"][:, -STEPS:]  # text
            for step in (inputs, {"input_ids": answer}):
                past, new = sum(part.shape[1] for part in ids), step["input_ids"].shape[1]
                whole = {
                    "attention_mask": torch.ones(1, past + new, dtype=torch.long),
                    "position_ids": torch.arange(past, past + new)[None],
                }
                with pruning.turn([layout]) if step is inputs else nullcontext():
                    found.append(model(**{**step, **whole}, **as_argument(cache)).logits[0, -STEPS:])
                ids.append(step["input_ids"])
            embeds += [
                embed(*(inputs.get(argument) for argument in ARGUMENTS[family.name])),
                model.model.embed_tokens(answer),
            ]
            rules = rules_of(family, layout, name, len(model.model.layers))
            turns.append(turn_of(start, start + len(layout), rules))
    expected = conversation_logits(model, torch.cat(ids, dim=1), turns, torch.cat(embeds, dim=1))
    ends = [turn.end for turn in turns]
    places = [place for end in ends for place in (*range(end - STEPS, end), *range(end, end + STEPS))]
    assert (torch.cat(found) - expected[places]).abs().max() < 1e-4
