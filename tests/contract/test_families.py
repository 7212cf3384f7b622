"""What every family that transformers has itself must do, on a tiny random model and its official processor.

A family is a module of `support.families` with `build(attention)`; it is tested without a line here. It may name a
`PLAN` of its own where its layers do not allow the usual one, the `PADDING` that its layouts know, the clips' frames a
second (`FPS`) where each frame that is shown costs hundreds of tokens, and how many samples of `SOUND` each clip has
where a batch of sounds of different length gives other encoder outputs than each sound alone.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastav.adapter import Prepared
from fastav.budgets import Share
from fastav.engines.transformers import Decoding, TransformersEngine, prune
from fastav.errors import CheckpointError, MediaError, UnsupportedPlan
from fastav.flops import prefill_flops
from fastav.layout import MEDIA, Layout, Modality
from fastav.media import Clip
from fastav.messages import Kind
from fastav.models.video_salmonn2_plus import VideoSalmonn2PlusProcessor
from fastav.pipelines import pipeline
from fastav.plan import Keep, Plan, Step
from fastav.presets import NONE, plus
from fastav.pruning.compiled import compile_plan
from fastav.recipes import recipe
from fastav.request import Request, Use
from media_files import tone, write_clip
from support.costs import answered, cached_alone, counted_flops
from support.family import EARLIER, EARLY, NAMES, REFERENCE, STEPS, Family, clips_of, family_of, generate
from support.masked import masked_logits, rules_of
from support.pairs import pairwise
from support.pretended import FIRST, pretended
from support.ties import assert_same_greedy

# for what attention does not change: `test_every_step_equals_the_masked_model` runs with both
EAGER_SLOW = ["sdpa", pytest.param("eager", marks=pytest.mark.slow)]


@pytest.fixture(params=NAMES)
def family(request):
    return family_of(request.param)


# --- prompts and layouts


def test_a_layout_is_as_long_as_its_prompt_and_is_read_off_the_inputs_too(family):
    lengths = family.prepared.inputs["attention_mask"].sum(1).tolist()
    assert [len(layout) for layout in family.prepared.layouts] == lengths
    assert lengths[0] > lengths[1]
    again = family.adapter.layouts(family.model().config, family.prepared.inputs)
    for ours, read in zip(family.prepared.layouts, again, strict=True):
        for name in ("modality", "frame", "padding"):
            assert np.array_equal(getattr(ours, name), getattr(read, name)), name


def test_a_batch_is_its_prompts_padded_at_the_left(family):
    ids = family.prepared.inputs["input_ids"]
    for row, request in enumerate(family.clips):
        alone = family.prepare(request)
        assert torch.equal(ids[row, -alone.inputs["input_ids"].shape[1] :], alone.inputs["input_ids"][0])
        assert np.array_equal(alone.layouts[0].modality, family.prepared.layouts[row].modality)


def test_media_have_seconds_within_the_clip_and_frames_in_order(family):
    for layout, request in zip(family.prepared.layouts, family.clips, strict=True):
        media = np.isin(layout.modality, MEDIA)
        assert media.any()
        assert np.isnan(layout.second[~media]).all()
        real = media & ~layout.padding
        assert np.isfinite(layout.second[real]).all()
        assert (layout.second[real] >= 0).all()
        assert (layout.second[real] <= request.clip.duration + 0.05).all()
        for modality in MEDIA:
            place = real & (layout.modality == modality)
            assert (np.diff(layout.second[place]) >= 0).all()
            assert (np.diff(layout.frame[place]) >= 0).all()
        seen = np.isin(layout.modality, (Modality.VIDEO, Modality.IMAGE))
        assert (layout.frame[seen] >= 0).all()


def test_a_model_has_audio_tokens_or_refuses_requests_for_audio(family):
    heard = [layout.count(Modality.AUDIO) for layout in family.prepared.layouts]
    if family.adapter.supports_audio:
        assert all(heard)
        return
    assert not any(heard)
    for use in (Use.BOTH, Use.AUDIO):
        with pytest.raises(MediaError, match="does not take audio"):
            family.prepare(Request(clip=clips_of(True)[0].clip, question="?", use=use))
    with_sound = family.prepare(Request(clip=clips_of(True)[0].clip, question="?"))
    assert with_sound.layouts[0].count(Modality.AUDIO) == 0


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_clips_of_few_frames_are_shown(family, frames):
    clip = Clip.from_arrays(frames=np.full((frames, 30, 40, 3), 90, np.uint8), fps=5)
    prepared = family.prepare(Request(clip=clip, question="?"))
    (layout,) = prepared.layouts
    assert len(layout) == prepared.inputs["input_ids"].shape[1]
    assert layout.count(Modality.VIDEO, Modality.IMAGE) > 0
    with torch.no_grad():
        assert family.model()(**prepared.inputs).logits.isfinite().all()


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (96_000, 2), (44_100, 6)])
def test_sound_of_any_rate_and_channels_is_heard(family, rate, channels):
    if not family.adapter.supports_audio:
        pytest.skip("it takes no audio")
    wave = np.sin(np.arange(2 * rate) / rate * 2_000).astype(np.float32)[None].repeat(channels, 0) / 4
    frames = np.full((20, 24, 32, 3), 90, np.uint8)
    at = Clip.from_arrays(frames=frames, fps=10, waveform=wave, sample_rate=rate)
    (layout,) = family.prepare(Request(clip=at, question="?")).layouts
    assert layout.count(Modality.AUDIO) > 0


def test_a_clip_without_sound_is_shown_without_audio_tokens(family):
    clip = Clip.from_arrays(frames=np.full((20, 24, 32, 3), 90, np.uint8), fps=10)
    (layout,) = family.prepare(Request(clip=clip, question="?")).layouts
    assert layout.count(Modality.AUDIO) == 0


def test_a_question_cannot_smuggle_in_placeholders(family):
    vocabulary = family.processor.tokenizer
    ids = family.prepared.inputs["input_ids"][0]
    marked = np.isin(family.prepared.layouts[0].modality, MEDIA)
    word = vocabulary.convert_ids_to_tokens(int(ids[-len(marked) :][torch.from_numpy(marked)][0]))
    with pytest.raises(MediaError, match="stands for media"):
        family.prepare(Request(clip=family.clips[0].clip, question=f"What is {word}?"))


def test_another_models_processor_is_refused(family):
    other = VideoSalmonn2PlusProcessor.from_pretrained(REFERENCE / "video_salmonn2_plus")
    with pytest.raises(CheckpointError, match=r"needs a \w+Processor, got VideoSalmonn2PlusProcessor"):
        family.adapter.prepare(other, family.clips)


# --- exactness


@pytest.mark.parametrize("attention", EAGER_SLOW)
@pytest.mark.parametrize("rows", [[0], [0, 1]])
def test_keeping_everything_changes_nothing(family, attention, rows):
    model, prepared = family.model(attention), family.prepare(*(family.clips[row] for row in rows))
    plain = generate(model, prepared)
    with prune(model, family.everything, layouts=prepared.layouts, adapter=family.adapter):
        kept = generate(model, prepared)
    assert_same_greedy(kept, plain, 1e-4)


def test_beams_that_keep_everything_are_the_plain_models(family):
    model, options = family.model(), {"num_beams": 2, "num_return_sequences": 2, "output_scores": True}
    plain, single = generate(model, family.prepared, **options), generate(model, family.prepared)
    copies = plain.logits[0].unflatten(0, (-1, 2))
    if (copies - single.logits[0][:, None]).abs().max() > 1e-3:  # transformers repeats media wrongly
        refused = pytest.raises(UnsupportedPlan, match="other frames, images or sounds than the prompt's own")
        with refused, prune(model, family.everything, layouts=family.prepared.layouts, adapter=family.adapter):
            generate(model, family.prepared, **options)
        return
    with prune(model, family.everything, layouts=family.prepared.layouts, adapter=family.adapter):
        kept = generate(model, family.prepared, **options)
    assert torch.equal(plain.sequences, kept.sequences)
    assert (plain.sequences_scores - kept.sequences_scores).abs().max() < 1e-4


PLANS = {
    "its own": lambda family: family.plan,
    "early": lambda family: EARLY,
    "the layer about to run": lambda family: family.own,
    "earlier caches": lambda family: EARLIER,
}


@pytest.mark.parametrize(("kind", "rows", "attention"), pairwise(PLANS, [(0,), (0, 1)], ["sdpa", "eager"]))
def test_every_step_equals_the_masked_model(family, attention, rows, kind):
    plan = PLANS[kind](family)
    if kind == "earlier caches" and is_windowed(family):
        pytest.skip("its early layers see only a window")
    out, prepared = family.generate(plan, rows, attention), family.prepare(*(family.clips[row] for row in rows))
    for row, number in enumerate(rows):
        layout, answer = prepared.layouts[row], out.sequences[row, -STEPS:]
        expected, plain = (family.masked_logits(number, answer, one, attention) for one in (plan, NONE))
        logits = torch.stack([step[row] for step in out.logits])
        assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
        assert (logits - plain).abs().max() > 1e-2 * expected.abs().max(), "the plan changes nothing here"
        kept = [sum(layer.values()) for layer in out.tokens[row]]
        assert kept == list(plan.tokens(layout, family.depth))
        assert kept[-1] < len(layout)


def test_caches_of_early_layers_that_see_a_window_are_not_cut(family):
    plan = Plan((Step(layers="middle", method="position", keep=Keep(media=Share(0.6)), earlier_caches=True),))
    config = family.adapter.decoder(family.model()).config
    if not is_windowed(family):
        compile_plan(plan, config, family.adapter)
        return
    with pytest.raises(UnsupportedPlan, match="layer 0 attends within a window, and its cache holds only the window"):
        compile_plan(plan, config, family.adapter)


def is_windowed(family: Family) -> bool:
    """Whether early layers see only a window, so that their caches cannot be cut."""
    return family.full_layers[0] > 0


def test_a_saved_checkpoint_answers_about_a_file(family, tmp_path):
    model, checkpoint = family.model(), tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    family.processor.save_pretrained(checkpoint)
    write_clip(tmp_path / "clip.mp4", frames=30, audio="aac", sound=tone(3.0, 44_100, 2), rate=44_100, layout="stereo")
    answers = []
    for plan in ("none", family.plan):
        pipe = pipeline(str(checkpoint), plan, device="cpu", dtype="float32")
        answers.append(pipe(tmp_path / "clip.mp4", "What is this?", max_new_tokens=3))
    plain, pruned = answers
    assert type(pipe.adapter) is type(family.adapter)
    assert pruned.prompt_tokens == plain.prompt_tokens
    assert pruned.flops.pruned < pruned.flops.full == plain.flops.pruned
    assert set(pruned.seconds) == {"media", "encode", "prefill", "decode"}
    assert pruned.seconds["encode"] > 0


@pytest.mark.parametrize("preset", ["fastav", "fastav-trim"])
def test_presets_answer_through_the_engine(family, preset):
    engine = TransformersEngine(family.model(), family.processor, family.adapter)
    answers = engine.generate(family.clips, family.adapter.preset(preset), max_new_tokens=2)
    for answer, layout in zip(answers, family.prepared.layouts, strict=True):
        assert len(answer.token_ids) == 2
        assert answer.prompt_tokens == layout.by_modality()
        assert answer.flops.ratio <= 1


# --- decoding by our own loop


@pytest.mark.parametrize("attention", EAGER_SLOW)
@pytest.mark.parametrize("plan", ["none", "pruned", pytest.param("earlier caches", marks=pytest.mark.slow)])
def test_our_decoding_says_what_generate_says_as_it_stands_and_with_fixed_shapes(family, attention, plan):
    if plan == "earlier caches" and is_windowed(family):
        pytest.skip("its early layers see only a window")
    plans = {"none": NONE, "pruned": family.plan, "earlier caches": EARLIER}
    model, chosen = family.model(attention), plans[plan]
    for rows in ([0], [0, 1]):
        prepared = family.prepare(*(family.clips[row] for row in rows))
        expected = family.generate(chosen, rows, attention)
        with prune(model, chosen, adapter=family.adapter, layouts=prepared.layouts):
            if len(rows) == 1:  # both in one context, one after the other
                expected = generate(model, prepared)
            for capture in (False, True):
                found = generate(model, prepared, custom_generate=Decoding(family.adapter, capture=capture))
                assert_same_greedy(found, expected, 1e-4)


# --- on several devices


@pytest.mark.parametrize("kind", ["its own", pytest.param("the layer about to run", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loop", ["generate", "ours"])
def test_a_decoder_on_several_devices_says_the_same(family, loop, kind):
    more = {"custom_generate": Decoding(family.adapter)} if loop == "ours" else {}
    said = []
    for model in family.placed:
        layouts = family.prepared.layouts
        with pretended(), prune(model, PLANS[kind](family), adapter=family.adapter, layouts=layouts) as pruning:
            inputs = {name: on_first(value) for name, value in family.prepared.inputs.items()}
            # the second step decodes with what the first wrote
            output = generate(model, replace(family.prepared, inputs=inputs), max_new_tokens=3, **more)
            said.append((output.sequences.tolist(), torch.stack(output.logits).cpu(), pruning.tokens()))
    (ids, logits, kept), (found_ids, found_logits, found_kept) = said
    assert found_ids == ids
    assert (found_logits - logits).abs().max() < 1e-5  # the same kernels, of copies that lie otherwise in memory
    assert found_kept == kept


def on_first(value: Any) -> Any:
    return value.to(FIRST) if isinstance(value, torch.Tensor) else value


def test_only_the_last_token_goes_through_the_head(family):
    model, seen = family.model(), []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    with prune(model, family.plan, adapter=family.adapter, layouts=family.prepared.layouts):
        generate(model, family.prepared, custom_generate=Decoding(family.adapter))
    hook.remove()
    assert set(seen) == {1}


def test_generate_prunes_by_the_same_layouts_when_it_reads_them_itself(family):
    model, plan, kept = family.model(), plus(), []
    for layouts in (family.prepared.layouts, None):
        with prune(model, plan, adapter=family.adapter, layouts=layouts) as pruning:
            generate(model, family.prepared)
        kept.append([slots for _, slots in pruning.slots()])
    assert all(torch.equal(given, read) for given, read in zip(*kept, strict=True))


# --- images beside a clip


@pytest.mark.parametrize("preset", ["fastav", "fastav-plus"])
def test_images_beside_a_clip_do_not_compete_with_it(family, preset):
    """Of two image tokens before a clip both went, since they shared one budget with it."""
    if family.prepared.layouts[0].count(Modality.IMAGE):
        pytest.skip("its clips are images")
    plan, clip = family.adapter.preset(preset), family.prepared.layouts[0]
    images = Layout.join([Layout.of(Modality.TEXT, 3), Layout.of(Modality.IMAGE, 2), clip])
    with_images, without = (plan.by_layer(layout, family.depth) for layout in (images, clip))
    for shown, plain in zip(with_images, without, strict=True):
        assert shown["image"] >= 1, "pooled with the clip, they could all go"
        assert {kind: n for kind, n in shown.items() if kind not in ("image", "text")} == {
            kind: n for kind, n in plain.items() if kind != "text"
        }


def test_a_users_prompt_with_an_image_and_a_video_is_pruned_exactly():
    family = family_of("qwen2_5_vl")
    model, processor, make = family.model(), family.processor, np.random.default_rng(0)
    seen = {"total_num_frames": 8, "fps": 2.0, "duration": 4.0, "width": 56, "height": 56}
    inputs = processor(
        text=[f"See {processor.image_token} and {processor.video_token}: who?"],
        images=[make.integers(0, 256, (28, 56, 3), dtype=np.uint8)],
        videos=[make.integers(0, 256, (8, 56, 56, 3), dtype=np.uint8)],
        video_metadata=[{**seen, "frames_indices": list(range(8))}],
        do_sample_frames=False,
        return_tensors="pt",
    )
    plan, (layout,) = family.adapter.preset("fastav"), family.adapter.layouts(model.config, inputs)
    with prune(model, plan) as pruning:
        out = generate(model, Prepared(inputs=dict(inputs), layouts=(layout,)))
    rules = rules_of(plan, layout, family.depth)
    answer = out.sequences[0, -STEPS:]
    expected = masked_logits(model, family.adapter.decoder(model).layers, dict(inputs), answer, rules)
    assert (torch.cat(out.logits) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert [layer["image"] for layer in pruning.tokens()[0]] == [8, 8, 8, 8, 8, 7, 6, 5]


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_omni"])
@pytest.mark.parametrize("last", [0, 1])
def test_a_decoder_no_deeper_than_its_deepstack_list_is_exact(name, last):
    """What the last layer adds to video comes after tokens have been laid out at full length again."""
    family = family_of(name)
    model, _ = family.module.build("sdpa")
    decoder, alone = family.adapter.decoder(model), family.prepare(family.clips[0])
    decoder.layers = decoder.layers[:2]
    decoder.config.num_hidden_layers = 2
    plan = Plan((Step(layers="1", method="position", keep=Keep(media=Share(0.5))),))
    with prune(model, plan, adapter=family.adapter), torch.no_grad():
        logits = model(**alone.inputs, logits_to_keep=last).logits[0, -1]
    rules = rules_of(plan, alone.layouts[0], 2)
    expected = masked_logits(model, decoder.layers, alone.inputs, torch.zeros(1, dtype=torch.long), rules)[0]
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


# --- messages


def messages_of_all(family: Family) -> list[dict[str, Any]]:
    """A conversation with every kind of media that a family takes: clips of different length, and texts between."""
    first, second = (request.clip for request in family.clips)
    picture = np.random.default_rng(1).integers(0, 256, (28, 36, 3), dtype=np.uint8)
    shown = [{"type": "video", "video": first}, {"type": "text", "text": "First."}]
    if family.adapter.name != "phi4-multimodal":  # which takes images or a video
        shown = [{"type": "image", "image": picture}, {"type": "text", "text": "And:"}, *shown]
    heard = [{"type": "audio", "audio": second}] * family.adapter.supports_audio
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": shown},
        {"role": "assistant", "content": "A bell."},
        {"role": "user", "content": [*heard, {"type": "text", "text": "Then"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "text", "text": "Now"}, {"type": "video", "video": second}]},
        {"role": "user", "content": "Who?"},
    ]


def test_tokens_of_each_medium_of_a_conversation_are_those_of_the_medium_alone(family):
    request = Request(messages=messages_of_all(family))
    prepared = family.prepare(request)
    (layout,) = prepared.layouts
    assert len(layout) == prepared.inputs["input_ids"].shape[1]
    assert (
        layout.items
        == len(request.media)
        == 2 + family.adapter.supports_audio + (family.adapter.name != "phi4-multimodal")
    )
    assert (np.diff(layout.item[layout.item >= 0]) >= 0).all()
    assert np.array_equal(layout.item >= 0, layout.modality != Modality.TEXT)
    for number, media in enumerate(request.media):
        part = layout.item == number
        if media.kind is Kind.AUDIO and family.adapter.name == "phi4-multimodal":
            continue  # it cannot answer about sound alone
        part_of = {"type": str(media.kind), str(media.kind): media.clip}
        (alone,) = family.prepare(Request(messages=[{"role": "user", "content": [part_of]}])).layouts
        for name in ("modality", "frame", "second", "padding"):
            expected = getattr(alone, name)[alone.item == 0]
            assert np.array_equal(getattr(layout, name)[part], expected, equal_nan=name == "second"), (number, name)


def test_layouts_of_a_conversation_are_read_off_the_inputs_too(family):
    prepared = family.prepare(Request(messages=messages_of_all(family)))
    (layout,) = prepared.layouts
    (read,) = family.adapter.layouts(family.model().config, prepared.inputs)
    assert np.array_equal(read.modality, layout.modality)
    assert np.array_equal(read.padding, layout.padding)
    if family.adapter.name.startswith(("qwen", "video-llama3")):  # whose tokens show which sound is of which video
        assert np.array_equal(read.item, layout.item)
        assert np.array_equal(read.frame, layout.frame)


@pytest.mark.parametrize("early", [False, True])
def test_a_conversation_about_several_media_equals_the_masked_model(family, early):
    plan = EARLY if early else family.plan
    prepared, model = family.prepare(Request(messages=messages_of_all(family))), family.model()
    with prune(model, plan, layouts=prepared.layouts, adapter=family.adapter) as pruning:
        out = generate(model, prepared)
    answer, (layout,) = out.sequences[0, -STEPS:], prepared.layouts
    layers, rules = family.adapter.decoder(model).layers, rules_of(plan, layout, family.depth)
    expected = masked_logits(model, layers, prepared.inputs, answer, rules)
    assert (torch.cat(out.logits) - expected).abs().max() < 1e-3 * expected.abs().max()
    kept = pruning.slots()[1][1][0].numpy() if early else None
    if kept is not None:  # the beginning of each clip stays, in proportion to its tokens
        for number in range(layout.items):
            part = np.flatnonzero(layout.item == number)
            stays = np.isin(part, kept)
            assert abs(stays.mean() - 0.6) <= 2 / len(part)
            assert not (np.diff(stays.astype(int)) > 0).any()


def test_a_conversation_in_a_batch_is_the_conversation_alone(family):
    long, short = Request(messages=messages_of_all(family)), family.clips[0]
    both, alone = family.prepare(short, long), family.prepare(long)
    width = alone.inputs["input_ids"].shape[1]
    assert torch.equal(both.inputs["input_ids"][1, -width:], alone.inputs["input_ids"][0])
    engine = TransformersEngine(family.model(), family.processor, family.adapter)
    answers = engine.generate([short, long], family.plan, max_new_tokens=2)
    assert [one.token_ids for one in answers] == [
        engine.generate([one], family.plan, max_new_tokens=2)[0].token_ids for one in (short, long)
    ]


def test_a_template_that_leaves_out_a_medium_is_one_error(family, monkeypatch):
    """Such a medium would be dropped in silence."""
    owner = family.processor.tokenizer if family.adapter.name == "phi4-multimodal" else family.processor
    texts = (
        "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    if family.adapter.name == "phi4-multimodal":  # whose contents are strings with the placeholders in them
        texts = "Who?"
    monkeypatch.setattr(owner, "chat_template", texts)
    with pytest.raises(MediaError):
        family.prepare(Request(clip=family.clips[0].clip, question="Who?"))


def test_text_alone_is_answered(family):
    engine = TransformersEngine(family.model(), family.processor, family.adapter)
    (answer,) = engine.generate(
        [Request(messages=[{"role": "user", "content": "Who?"}])], family.plan, max_new_tokens=2
    )
    assert set(answer.prompt_tokens) == {"text"}
    assert answer.flops.ratio == 1


# --- costs


@pytest.mark.parametrize("plan", ["fastav", "fastav-trim", "its own", "caches", "earlier caches", "omnizip"])
def test_told_kv_bytes_are_what_the_cache_holds(family, plan):
    adapter, model = family.adapter, family.model()
    if plan == "omnizip" and adapter.audio_attention() is None:
        pytest.skip("its encoder's attention is not told")
    if plan == "earlier caches" and is_windowed(family):
        pytest.skip("its early layers see only a window")
    named = {
        "its own": family.plan,
        "caches": cached_alone(adapter, model.config),
        "earlier caches": EARLIER,
        "omnizip": recipe("omnizip"),
    }
    chosen = named[plan] if plan in named else adapter.preset(plan)
    engine = TransformersEngine(model, family.processor, adapter)
    together, _ = answered(engine, family.clips, chosen)
    for number, request in enumerate(family.clips):
        (alone,), held = answered(engine, [request], chosen)
        assert alone.kv_bytes.pruned == held
        assert alone.kv_bytes.full == family.unpruned_bytes(number)
        assert together[number].kv_bytes == alone.kv_bytes


def test_told_flops_are_what_pytorch_counts(family):
    model, (layout,) = family.model("eager"), family.prepare(family.clips[0]).layouts
    shape = family.adapter.shape(model.config)
    inputs = dict(family.prepare(family.clips[0]).inputs)
    counted = counted_flops(model, family.adapter.decoder(model).layers, inputs)
    told = prefill_flops(shape, [len(layout)] * shape.layers, causal=False)
    assert counted == told
