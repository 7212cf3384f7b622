"""How the embedded model is made: labels that are true, packed questions that see only their own, rates."""

import numpy as np
import pytest
import torch
from training import attention
from training.data import Bank, Labelled, pack
from training.decoder import PHASES, Lessons, Shown, phase_of
from training.encoders import audio_features, video_features
from training.labels import IGNORED, KNOCK
from training.model import for_long_clips, lengthened, untrained
from training.optimizers import rate

from fastav.models.tiny import TinyAdapter
from fastav.models.tiny_long import TinyLongAdapter
from fastav.request import Request
from fastav.world import LONG_SECONDS, SECONDS, Scene, clip, kinds


@pytest.fixture(scope="module")
def made():
    model, processor = untrained(0)
    banks = Bank.draw(6, 0), Bank.draw(12, 0, LONG_SECONDS)
    schemes = model.config.scheme, lengthened(model.config.scheme)
    rendered = [Labelled.of(bank, scheme) for bank, scheme in zip(banks, schemes, strict=True)]
    shown = []
    for bank, labelled in zip(banks, rendered, strict=True):
        with torch.no_grad():
            seen = video_features(model.model, labelled.frames)
            shown.append(Shown(bank, seen, audio_features(model.model, labelled.fbanks)))
    return model.eval(), processor, rendered, Lessons(model, processor, *shown, 0)


@pytest.mark.parametrize("long", [False, True])
def test_labels_name_what_is_there(made, long):
    rendered, lessons = made[2][long], made[3]
    bank = (lessons.long if long else lessons.shown).bank
    for number, picture in enumerate(bank.pictures):
        objects = rendered.objects[number].view(-1, 16)
        assert ((objects > 0).sum(1) == len(picture.objects)).all()
        still = (rendered.motions[number] == 0).any()
        assert bool(still) == (long or picture.rest != "never" or picture.distractor is not None)
        moving = (rendered.motions[number] > 0).view(-1, 16).any(1).nonzero()[:, 0]
        assert picture.offset <= int(moving.min()) <= int(moving.max()) < picture.offset + 5  # pairs last a second
    for number, sound in enumerate(bank.sounds):
        starts = rendered.starts[number].view(-1, 3)
        assert int(starts[:, 0].sum()) == len(sound.beeps)
        noises = set(rendered.noises[number].tolist()) - {0, IGNORED}
        assert len(noises - {KNOCK}) == bool(sound.beeps)
        assert (KNOCK in noises) == (sound.knock != "never")


@pytest.mark.parametrize("long", [False, True])
def test_packed_questions_get_the_logits_that_each_gets_alone(made, tmp_path, long):
    model, processor, _, lessons = made
    adapter = TinyLongAdapter() if long else TinyAdapter()
    alike = model
    if long:
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        for_long_clips(tmp_path / "model", tmp_path / "long")
        alike, processor = adapter.load(str(tmp_path / "long"))
    shown = lessons.long if long else lessons.shown
    kinds = [["colour", "caption", "count"], ["fits", "see", "knock"]]
    scenes = [(0, 1), (2, 3)]
    batch = pack(lessons.processor, shown.bank, scenes, kinds, lessons._start(shown), np.random.default_rng(0))
    usual, model.config._attn_implementation = model.config._attn_implementation, attention.NAME
    with torch.no_grad():
        packed = lessons._logits(shown, batch)
    model.config._attn_implementation = usual
    for row, (picture, sound) in enumerate(scenes):
        drawn = clip(Scene(shown.bank.pictures[picture], shown.bank.sounds[sound]))
        begin = 0
        for number in range(3):
            said = torch.nonzero((batch.questions[row] == number) & (batch.weights[row] > 0))[:, 0]
            asked = batch.ids[row, begin : said[0] + 1]
            text = processor.tokenizer.decode(asked[:-1])
            prepared = adapter.prepare(processor, [Request(clip=drawn, question=text)])
            assert torch.equal(prepared.inputs["input_ids"][0, -len(asked) :], asked)
            assert (len(prepared.layouts[0]) > 1000) == long
            with torch.no_grad():
                alone = alike(**prepared.inputs).logits[0, -1]
            assert (packed[row, said[0]] - alone).abs().max() < 0.01 * alone.abs().max()
            begin = int(said[-1]) + 2


def test_a_batch_depends_on_its_number_alone_so_training_can_be_resumed(made):
    lessons = made[3]
    first, again, other = (lessons._batch(number)[1] for number in (5, 5, 6))
    assert torch.equal(first.ids, again.ids)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


def test_no_scene_of_a_batch_is_held_out(made):
    bank = made[3].shown.bank
    for split in (True, False):
        for picture, sound in bank.scenes(8, np.random.default_rng(0), held_out=split):
            assert Scene(bank.pictures[picture], bank.sounds[sound]).held_out == split


def test_phases_follow_each_other_and_every_kind_is_asked():
    assert phase_of(0) == (PHASES[0], 0)
    assert phase_of(PHASES[0].steps + 3) == (PHASES[1], 3)
    rng = np.random.default_rng(0)
    asked = {kind for phase in PHASES for _ in range(20) for kind in phase.kinds(rng, SECONDS)}
    assert asked == set(kinds(SECONDS))
    assert {kind for _ in range(20) for kind in PHASES[-1].kinds(rng, LONG_SECONDS)} == set(kinds(LONG_SECONDS))


def test_every_second_step_of_some_phases_is_about_long_clips(made):
    lessons = made[3]
    begin = sum(phase.steps for phase in PHASES[:-1])
    assert PHASES[-1].long
    assert lessons._batch(begin)[0] is lessons.shown
    assert lessons._batch(begin + 1)[0] is lessons.long


def test_rates_go_up_stay_and_go_down():
    rates = [rate(step, 1000, 0.3) for step in range(1000)]
    assert rates[0] < 0.05
    assert set(rates[50:290]) == {1.0}
    assert rates[-1] == 0.02
