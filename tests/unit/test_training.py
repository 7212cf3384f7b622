"""How the embedded model is made: labels that are true, packed questions that see only their own, rates."""

import numpy as np
import pytest
import torch
from training import attention
from training.data import Bank, Labelled, pack
from training.decoder import Lessons, Shown, phase_of
from training.encoders import audio_features, video_features
from training.model import for_long_clips, interleaved, lengthened, untrained
from training.optimizers import rate
from training.parade import TELL, Parade
from training.parade_labels import SIDES
from training.toy import Toy
from training.toy_labels import KNOCK
from training.world import IGNORED

from fastav import parade
from fastav import world as toy_world
from fastav.layout import Modality
from fastav.models.tiny import TinyAdapter
from fastav.models.tiny_long import TinyLongAdapter
from fastav.parade.scene import BACKDROPS, COLOURS, DIRECTIONS, PITCHES, SOUNDS, THINGS
from fastav.request import Request


@pytest.fixture(scope="module", params=[Toy, Parade])
def made(request):
    world = request.param()
    model, processor = untrained(0, world)
    banks = [Bank.draw(world, 12, 0, seconds) for seconds in world.lengths]
    schemes = [lengthened(model.config.scheme, bank.seconds) for bank in banks]
    rendered = [Labelled.of(bank, scheme) for bank, scheme in zip(banks, schemes, strict=True)]
    shown = []
    for bank, scheme, labelled in zip(banks, schemes, rendered, strict=True):
        words = world.described(labelled.seen, labelled.heard)
        with torch.no_grad():
            seen = video_features(model.model, labelled.frames)
            shown.append(Shown(bank, scheme, seen, audio_features(model.model, labelled.fbanks), words))
    return model.eval(), processor, rendered, Lessons(model, processor, world, shown, 0)


def lengths(made) -> range:
    return range(len(made[3].world.lengths))


def test_labels_name_what_is_there_in_the_toy_world(made):
    if made[3].world.folder != "tiny":
        pytest.skip("of the toy world alone")
    for long in lengths(made):
        rendered, bank = made[2][long], made[3].shown[long].bank
        for number, picture in enumerate(bank.pictures):
            objects, motions = rendered.seen["objects"][number].view(-1, 16), rendered.seen["motions"][number]
            assert ((objects > 0).sum(1) == len(picture.objects)).all()
            still = (motions == 0).any()
            assert bool(still) == (bool(long) or picture.rest != "never" or picture.distractor is not None)
            moving = (motions > 0).view(-1, 16).any(1).nonzero()[:, 0]
            assert picture.offset <= int(moving.min()) <= int(moving.max()) < picture.offset + 5  # pairs last a second
        for number, sound in enumerate(bank.sounds):
            starts = rendered.heard["starts"][number].view(-1, 3)
            assert int(starts[:, 0].sum()) == len(sound.beeps)
            noises = set(rendered.heard["noises"][number].tolist()) - {0, IGNORED}
            assert len(noises - {KNOCK}) == bool(sound.beeps)
            assert (KNOCK in noises) == (sound.knock != "never")


def test_labels_name_what_is_there_in_the_parade(made):
    if made[3].world.folder != "parade":
        pytest.skip("of the parade alone")
    for length in lengths(made):
        rendered, bank = made[2][length], made[3].shown[length].bank
        for number, picture in enumerate(bank.pictures):
            labels = {name: rendered.seen[name][number].view(bank.seconds, 4, 4) for name in rendered.seen}
            (backdrop,) = set(labels["backdrops"].flatten().tolist()) - {IGNORED}
            assert BACKDROPS[backdrop] == picture.backdrop
            for index, thing in enumerate(THINGS):
                (when, rows, columns) = (labels["things"] == 1 + index).nonzero(as_tuple=True)
                shown = [actor for actor in picture.actors if actor.thing == thing]
                assert bool(len(when)) == bool(shown)
                for actor in shown:
                    here = labels["colours"][when, rows, columns].unique().tolist()
                    assert [COLOURS[colour] for colour in here] == [actor.colour]
                    assert [DIRECTIONS[way] for way in labels["directions"][when, rows, columns].unique()] == [
                        actor.direction
                    ]
                    assert [SIDES[side] for side in labels["sides"][when, rows, columns].unique()] == [actor.place]
                    assert actor.start - 1 < int(when.min()) <= int(when.max()) < actor.end  # pairs last a second
                    for second, row, column in zip(when.tolist(), rows.tolist(), columns.tolist(), strict=True):
                        x, y = 4 * actor.centre(np.array([second + 0.5]))[0]
                        assert max(abs(x - column - 0.5), abs(y - row - 0.5)) < 1.5
        for number, sound in enumerate(bank.sounds):
            notes = rendered.heard["notes"][number].view(-1, 3, len(SOUNDS), len(PITCHES))[:, 0]
            starts = rendered.heard["starts"][number].view(-1, 3, len(SOUNDS))[:, 0]
            told = {(n.sound, n.pitch) for n in sound.noises}
            assert {(SOUNDS[s], PITCHES[p]) for s, p in (notes == 1).any(0).nonzero().tolist()} == told
            strokes = {noise.sound: noise.strokes for noise in sound.noises}
            assert {SOUNDS[s]: int(n) for s, n in enumerate(starts.sum(0).tolist()) if n} == strokes


def test_words_for_tokens_are_those_of_their_labels():
    world = Parade()
    bank = Bank.draw(world, 4, 0, 8)
    labelled = Labelled.of(bank, untrained(0, world)[0].config.scheme)
    video, audio = world.described(labelled.seen, labelled.heard)
    for number, picture in enumerate(bank.pictures):
        told = {world.align_words[word] for word in video[number].any(0).nonzero()[:, 0]}
        facts = {fact for a in picture.actors for fact in (a.thing, a.colour, a.direction, a.place)}
        assert told == facts
    for number, sound in enumerate(bank.sounds):
        told = {world.align_words[word] for word in audio[number].any(0).nonzero()[:, 0]}
        assert told == {fact for n in sound.noises for fact in (n.sound, n.pitch)}


ALONE = {"tiny": ["colour", "see", "caption"], "parade": ["colour", "see", "backdrop"]}


@pytest.mark.parametrize("mixed", [False, True])
def test_packed_questions_get_the_logits_that_each_gets_alone(made, tmp_path, mixed):
    model, processor, _, lessons = made
    world = lessons.world
    if mixed and not world.interleaved:
        pytest.skip("this world is trained with one layout")
    saved = tmp_path / "model"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    for length, seconds in list(enumerate(world.lengths))[:2]:
        name = saved
        adapter: TinyAdapter = TinyAdapter()
        if length:
            name, adapter = tmp_path / "long", TinyLongAdapter()
            for_long_clips(saved, name, seconds)
        if mixed:
            interleaved(name, tmp_path / "mixed")
            name = tmp_path / "mixed"
        alike, reader = adapter.load(str(name))
        shown = lessons.shown[length]
        kinds = [ALONE[world.folder]] * 2
        scenes = [(0, 1), (2, 3)]
        batch = pack(processor, shown.bank, scenes, kinds, lessons._start(shown), np.random.default_rng(0))
        usual, model.config._attn_implementation = model.config._attn_implementation, attention.NAME
        with torch.no_grad():
            packed = lessons._logits(shown, batch, *lessons._media(shown, batch), mixed)
        model.config._attn_implementation = usual
        for row, (picture, sound) in enumerate(scenes):
            drawn = clip_of(world, shown.bank.pictures[picture], shown.bank.sounds[sound])
            begin = 0
            for number in range(3):
                said = torch.nonzero((batch.questions[row] == number) & (batch.weights[row] > 0))[:, 0]
                asked = batch.ids[row, begin : said[0] + 1]
                text = processor.tokenizer.decode(asked[:-1])
                prepared = adapter.prepare(reader, [Request(clip=drawn, question=text)])
                assert torch.equal(prepared.inputs["input_ids"][0, -len(asked) :], asked)
                modality = prepared.layouts[0].modality
                blocks = 1 + np.count_nonzero(np.diff(modality[modality != Modality.TEXT]))
                assert blocks == (2 * seconds if mixed else 2)
                with torch.no_grad():
                    alone = alike(**prepared.inputs).logits[0, -1]
                assert (packed[row, said[0]] - alone).abs().max() < 0.01 * alone.abs().max()
                begin = int(said[-1]) + 2


def clip_of(world, picture, sound):
    """A scene as a clip in memory."""
    scene, clip = (toy_world.Scene, toy_world.clip) if world.folder == "tiny" else (parade.Scene, parade.clip)
    return clip(scene(picture, sound))


def test_a_batch_depends_on_its_number_alone_so_training_can_be_resumed(made):
    lessons = made[3]
    first, again, other = (lessons._batch(number)[1] for number in (5, 5, 6))
    assert torch.equal(first.ids, again.ids)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


def test_noise_depends_on_the_step_alone(made):
    lessons = made[3]
    shown, batch = lessons.shown[0], lessons._batch(3)[1]
    with torch.no_grad():
        clean, noisy, again = (lessons._media(shown, batch, noise)[0] for noise in (0, 0.1, 0.1))
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, clean)


def test_no_scene_of_a_batch_is_held_out(made):
    world = made[3].world
    for split in (True, False):
        bank = Bank.draw(world, 40, 0, world.lengths[0], held_out=split)
        for picture, sound in bank.scenes(8, np.random.default_rng(0), held_out=split):
            if world.folder == "tiny":
                assert toy_world.Scene(bank.pictures[picture], bank.sounds[sound]).held_out == split
            else:
                assert bank.pictures[picture].held_out == bank.sounds[sound].held_out == split


def test_phases_follow_each_other_and_every_kind_is_asked(made):
    world = made[3].world
    phases = world.phases
    assert phase_of(phases, 0) == (phases[0], 0)
    assert phase_of(phases, phases[0].steps + 3) == (phases[1], 3)
    rng = np.random.default_rng(0)
    for length in world.lengths:
        used = [phase for phase in phases if world.lengths.index(length) in phase.turns]
        asked = {kind for phase in used for _ in range(40) for kind in world.kinds(phase, rng, length)}
        assert asked - {TELL} == set(world.all_kinds(length))


def test_some_steps_of_the_last_phase_are_about_long_clips(made):
    lessons = made[3]
    phases = lessons.world.phases
    begin = sum(phase.steps for phase in phases[:-1])
    turns = [lessons._batch(begin + number)[0] for number in range(len(phases[-1].turns))]
    assert tuple(turns) == phases[-1].turns
    assert set(turns) == set(lengths(made))


def test_answers_are_counted_by_kind_and_third(made):
    lessons = made[3]
    world = lessons.world
    bank = Bank.draw(world, 40, 1, world.lengths[0], held_out=True)
    labelled = Labelled.of(bank, lessons.shown[0].scheme)
    with torch.no_grad():
        both = (
            video_features(lessons.model.model, labelled.frames),
            audio_features(lessons.model.model, labelled.fbanks),
        )
    right = lessons.right(Shown(bank, lessons.shown[0].scheme, *both), 12)
    thirds = {"early", "middle", "late", "whole"} if world.folder == "parade" else set()
    assert set(right) == set(world.all_kinds(bank.seconds)) | thirds
    assert all(0 <= share <= 1 for share in right.values())


def test_rates_go_up_stay_and_go_down():
    rates = [rate(step, 1000, 0.3) for step in range(1000)]
    assert rates[0] < 0.05
    assert set(rates[50:290]) == {1.0}
    assert rates[-1] == 0.02


def test_attention_of_the_parade_starts_as_a_match(made):
    model, _, _, lessons = made
    attends = model.model.layers[0].self_attn
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    queries, keys = (part.weight.unflatten(0, (-1, attends.head_dim)) for part in (attends.q_proj, attends.k_proj))
    assert torch.equal(queries, keys.repeat_interleave(heads, 0)) == lessons.world.matching


def test_facts_after_names_are_those_that_questions_get():
    world, rng = Parade(), np.random.default_rng(0)
    known = untrained(0, world)[1].tokenizer
    for _ in range(40):
        scene = parade.Scene.draw(rng, held_out=False)
        told = world.ask(TELL, scene.picture, scene.sound, rng)
        assert told is not None
        assert known.unk_token_id not in known(f"{told.text} {told.answer}", add_special_tokens=False)["input_ids"]
        words = told.answer.split()
        (name,) = set(words[::2])
        assert f"describe the {name}." == told.text
        kinds = ("colour", "direction", "side", "seen-when") if name in THINGS else ("strokes", "pitch", "heard-when")
        for kind, fact in zip(kinds, words[1::2], strict=True):
            answers = {q.answer for q in (parade.ask(kind, scene, rng) for _ in range(60)) if f" {name}" in q.text}
            assert answers == {fact}
