"""video-SALMONN 2+ on a real mp4, pruned: M-RoPE against a dense oracle, both position rules, and the pipeline."""

import math
from pathlib import Path

import pytest
import torch

import fastav
from fastav.budgets import Tokens
from fastav.cache_argument import as_argument, of_output
from fastav.engines.transformers import prune
from fastav.layout import MEDIA, Modality
from fastav.media import Clip
from fastav.models.video_salmonn2_plus import VideoSalmonn2PlusAdapter, VideoSalmonn2PlusProcessor
from fastav.plan import Keep
from fastav.presets import fastav as fastav_plan
from fastav.request import Request, Use
from support.oracle import drop_lowest, keep_only_first

BUNDLE = Path(__file__).parents[1] / "reference" / "video_salmonn2_plus"
ASKED = (("What moves, and what sound is heard?", Use.BOTH), ("What colour?", Use.VIDEO), ("Why?", Use.BOTH))
STEPS = 4
BY_TOKENS = fastav_plan(Keep(audio=Tokens(7), video=Tokens(100)), name="by-tokens")


@pytest.fixture(scope="module")
def loaded():
    adapter = VideoSalmonn2PlusAdapter()
    model, processor = adapter.load(str(BUNDLE), dtype=torch.float32)
    return adapter, model, processor


@pytest.fixture(scope="module")
def requests():
    clip = Clip.open(BUNDLE / "clip.mp4")
    return [Request(clip=clip, question=question, use=use) for question, use in ASKED]


@pytest.fixture(scope="module", params=["script", "dataset"])
def processor(loaded, request):
    scheme = loaded[2].scheme | {"positions": request.param}
    return VideoSalmonn2PlusProcessor(loaded[2].tokenizer, scheme=scheme)


@pytest.fixture(params=["sdpa", "eager"])
def model(loaded, request):
    model = loaded[1]
    before = model.config._attn_implementation
    model.set_attn_implementation(request.param)
    yield model
    model.set_attn_implementation(before)


def rotary(config, positions):
    """Cosines and sines [tokens, head] of positions [3, tokens]: each frequency turns with the axis of its section."""
    sections = config.rope_parameters["mrope_section"]
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    half = config.hidden_size // config.num_attention_heads // 2
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half).double() / half)
    angles = (positions[axis].double().T * frequency).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def turned(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def oracle_logits(model, embeds, positions, prompt, rules):
    """As `support.oracle`, for one row of embeddings [tokens, hidden] at positions [3, tokens]."""
    text, config = model.model, model.config.text_config
    n, hidden, score = len(embeds), embeds, None
    cos, sin = rotary(config, positions)
    hide = torch.zeros(prompt, dtype=torch.bool)
    for index, layer in enumerate(text.layers):
        if index in rules:
            hide = rules[index](score, hide.clone())
        gone = torch.cat([hide, torch.zeros(n - prompt, dtype=torch.bool)])
        x = layer.input_layernorm(hidden)
        attention = layer.self_attn
        q, k, v = (
            projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
        seen = (torch.ones(n, n).tril().bool() & ~gone[None]) | torch.eye(n, dtype=torch.bool)
        weights = (q @ k.mT * attention.head_dim**-0.5).masked_fill(~seen, float("-inf")).softmax(-1)
        score = weights[:, prompt - 1, :prompt].mean(0)
        hidden = hidden + attention.o_proj((weights @ v).transpose(0, 1).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(text.norm(hidden))


def plan_of(adapter, name):
    return BY_TOKENS if name == "by-tokens" else adapter.preset(name)


def rules_of(layout, name, depth):
    modality = torch.from_numpy(layout.modality.copy())
    audio, video = modality == int(Modality.AUDIO), modality == int(Modality.VIDEO)
    media = torch.isin(modality, torch.tensor(MEDIA, dtype=torch.int8))
    if name == "none":
        return {}
    if name == "fastav-trim":
        padding = torch.from_numpy(layout.padding.copy())
        return {0: lambda score, hide: hide | padding}
    first = keep_only_first(media, math.ceil(0.4 * int(media.sum())))
    if name == "by-tokens":
        hear, see = keep_only_first(audio, 7), keep_only_first(video, 100)
        first = lambda score, hide: see(score, hear(score, hide))  # noqa: E731
    rules = {depth // 2: first}
    return rules | {layer: drop_lowest(media, 0.2) for layer in range(depth // 2 + 1, depth)}


@pytest.mark.parametrize("name", ["none", "fastav", "fastav-trim", "by-tokens"])
@pytest.mark.parametrize("rows", [1, 3])
def test_pruning_equals_the_oracle(loaded, model, processor, requests, name, rows):
    adapter = loaded[0]
    prepared, plan = adapter.prepare(processor, requests[:rows]), plan_of(adapter, name)
    inputs, depth = dict(prepared.inputs), len(model.model.layers)
    assert rows == 1 or not inputs["attention_mask"].all()
    with torch.inference_mode():
        merged = model.embed(
            inputs["input_ids"],
            inputs["pixel_values_videos"],
            inputs["video_grid_thw"],
            inputs["input_features"],
        )
        with prune(model, plan) as pruning:
            out = model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        for row, layout in enumerate(prepared.layouts):
            n = len(layout)
            embeds = torch.cat([merged[row, -n:], model.model.embed_tokens(out.sequences[row, -STEPS:])])
            before = inputs["position_ids"][:, row, -n:]
            positions = torch.cat([before, before[:, -1:] + 1 + torch.arange(STEPS)], dim=1)
            expected = oracle_logits(model, embeds, positions, n, rules_of(layout, name, depth))[n - 1 : -1]
            assert (torch.stack([step[row] for step in out.logits]) - expected).abs().max() < 1e-4
            if name != "none":
                assert [sum(x.values()) for x in pruning.tokens()[row]] == list(plan.tokens(layout, depth))


@pytest.mark.parametrize("axes", [3, 4])
def test_generated_tokens_stand_where_the_unpruned_models_do(loaded, model, processor, requests, axes):
    adapter, seen = loaded[0], []
    inputs = dict(adapter.prepare(processor, requests).inputs)
    if axes == 4:
        text = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = torch.cat([text[None], inputs["position_ids"]])
    hook = model.model.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["position_ids"]), with_kwargs=True)
    try:
        for plan in ("none", "fastav", "fastav-trim"):
            with prune(model, plan, adapter=adapter):
                model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    finally:
        hook.remove()
    plain, *pruned = seen[:STEPS], seen[STEPS : 2 * STEPS], seen[2 * STEPS :]
    assert [p.shape[-1] for p in plain] == [inputs["input_ids"].shape[1], 1, 1, 1]
    assert plain[-1].shape[0] == axes
    for steps in pruned:
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(steps, plain, strict=True))


@pytest.mark.parametrize("name", ["none", "fastav", "fastav-trim"])
def test_decoding_by_hand_places_tokens_as_generate_does(loaded, model, processor, requests, name):
    adapter = loaded[0]
    inputs = dict(adapter.prepare(processor, requests).inputs)
    with torch.inference_mode(), prune(model, name, adapter=adapter):
        wanted = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        mask = inputs["attention_mask"]
        out = model(**inputs, use_cache=True)
        for step in range(3):
            assert (out.logits[:, -1] - wanted.logits[step]).abs().max() < 1e-4
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            new = wanted.sequences[:, step - 3][:, None]
            out = model(input_ids=new, attention_mask=mask, **as_argument(of_output(out)))


def test_a_later_turn_goes_on_from_the_pruned_cache(loaded, model, processor, requests):
    adapter = loaded[0]
    inputs = dict(adapter.prepare(processor, requests[:1]).inputs)
    seen = []
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with torch.inference_mode(), prune(model, "fastav", adapter=adapter):
        first = model.generate(**inputs, **options)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        place = lambda _, __, kw: seen.append(kw["position_ids"])  # noqa: E731
        hook = model.model.register_forward_pre_hook(place, with_kwargs=True)
        try:
            model.generate(input_ids=ids, **as_argument(of_output(first)), **options)
        finally:
            hook.remove()
    start = int(inputs["position_ids"][0, 0, -1]) + 1
    # the third token was generated but not yet read; it and three new ones enter the cache, then two generated ones
    assert [p[:, 0].tolist() for p in seen] == [
        [list(range(start + 2, start + 6))] * 3,
        [[start + 6]] * 3,
        [[start + 7]] * 3,
    ]


def test_the_pipeline_answers_with_its_evidence():
    pipe = fastav.pipeline(str(BUNDLE), plan="fastav")
    pieces: list[str] = []
    answer = pipe(BUNDLE / "clip.mp4", ASKED[0][0], max_new_tokens=8, on_text=pieces.append)
    plain = pipe(BUNDLE / "clip.mp4", ASKED[0][0], max_new_tokens=8, plan="none")
    assert "".join(pieces).strip() == answer.text
    text = answer.prompt_tokens["text"]
    assert answer.prompt_tokens == {"text": text, "audio": 60, "video": 240}
    assert [sum(layer.values()) for layer in answer.tokens_per_layer] == [text + k for k in (300, 300, 120, 96)]
    assert plain.flops.ratio == plain.kv_bytes.ratio == 1.0
    assert 0.5 < answer.flops.ratio < 0.95
    assert all(seconds > 0 for seconds in answer.seconds.values())
