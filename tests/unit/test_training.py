"""How the embedded model is made: labels that are true, packed questions that see only their own, rates."""

import numpy as np
import pytest
import torch
from training import attention
from training.data import Bank, Labelled, kinds_of, pack
from training.decoder import Lessons, Shown
from training.encoders import audio_features, video_features
from training.labels import IGNORED, KNOCK
from training.model import untrained
from training.optimizers import rate

from fastav.adapter import Request
from fastav.models.tiny import TinyAdapter
from fastav.world import Scene, clip


@pytest.fixture(scope="module")
def made():
    model, processor = untrained(0)
    bank = Bank.draw(6, 0)
    rendered = Labelled.of(bank, model.config.scheme)
    with torch.no_grad():
        seen = video_features(model.model, rendered.frames)
        heard = audio_features(model.model, rendered.fbanks)
    return model.eval(), processor, rendered, Lessons(model, processor, Shown(bank, seen, heard), 0)


def test_labels_name_what_is_there(made):
    _, _, rendered, lessons = made
    for number, picture in enumerate(lessons.shown.bank.pictures):
        objects = rendered.objects[number].view(-1, 16)
        assert ((objects > 0).sum(1) == len(picture.objects)).all()
        still = (rendered.motions[number] == 0).any()
        assert bool(still) == (picture.rest != "never" or picture.distractor is not None)
    for number, sound in enumerate(lessons.shown.bank.sounds):
        starts = rendered.starts[number].view(24, 3)
        assert int(starts[:, 0].sum()) == len(sound.beeps)
        noises = set(rendered.noises[number].tolist()) - {0, IGNORED}
        assert len(noises - {KNOCK}) == bool(sound.beeps)
        assert (KNOCK in noises) == (sound.knock != "never")


def test_packed_questions_get_the_logits_that_each_gets_alone(made):
    model, processor, _, lessons = made
    kinds = [["colour", "caption", "count"], ["fits", "see", "knock"]]
    scenes = [(0, 1), (2, 3)]
    batch = pack(processor, lessons.shown.bank, scenes, kinds, lessons._start, np.random.default_rng(0))
    usual, model.config._attn_implementation = model.config._attn_implementation, attention.NAME
    with torch.no_grad():
        packed = lessons._logits(lessons.shown, batch)
    model.config._attn_implementation = usual
    for row, (picture, sound) in enumerate(scenes):
        shown = clip(Scene(lessons.shown.bank.pictures[picture], lessons.shown.bank.sounds[sound]))
        begin = 0
        for number in range(3):
            said = torch.nonzero((batch.questions[row] == number) & (batch.weights[row] > 0))[:, 0]
            asked = batch.ids[row, begin : said[0] + 1]
            text = processor.tokenizer.decode(asked[:-1])
            prepared = TinyAdapter().prepare(processor, [Request(clip=shown, question=text)])
            assert torch.equal(prepared.inputs["input_ids"][0, -len(asked) :], asked)
            with torch.no_grad():
                alone = model(**prepared.inputs).logits[0, -1]
            assert (packed[row, said[0]] - alone).abs().max() < 0.01 * alone.abs().max()
            begin = int(said[-1]) + 2


def test_a_batch_depends_on_its_number_alone_so_training_can_be_resumed(made):
    lessons = made[3]
    first, again, other = (lessons._batch(number) for number in (5, 5, 6))
    assert torch.equal(first.ids, again.ids)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


def test_no_scene_of_a_batch_is_held_out(made):
    bank = made[3].shown.bank
    for split in (True, False):
        for picture, sound in bank.scenes(8, np.random.default_rng(0), held_out=split):
            assert Scene(bank.pictures[picture], bank.sounds[sound]).held_out == split


def test_the_second_phase_asks_what_bridges_picture_and_sound():
    asked = kinds_of(1, np.random.default_rng(0))
    assert {"fits", "sound-of", "shape-of"} <= set(asked)


def test_rates_go_up_stay_and_go_down():
    rates = [rate(step, 1000, 0.3) for step in range(1000)]
    assert rates[0] < 0.05
    assert set(rates[50:290]) == {1.0}
    assert rates[-1] == 0.02
