"""The toy world: the same each time, true to what its answers say, and fit for files."""

import re

import numpy as np
import pytest
from scipy import ndimage

from fastav.media import Clip
from fastav.task import Grade, Sample
from fastav.tasks.toy_world import ToyWorldTask
from fastav.tasks.toy_world_long import ToyWorldLongTask
from fastav.world import FAMILIES, KINDS, Scene, ask, caption, clip, frames, sentences, waveform, write
from fastav.world.render import FPS, RATE, RGB, SIDE
from fastav.world.scene import FITS, LAST_SOUND, LONG_SECONDS, SECONDS
from support.clip_files import written

SCENES = [Scene.draw(np.random.default_rng(number), held_out=bool(number % 2)) for number in range(60)]
LONG = [Scene.draw(np.random.default_rng(number), held_out=True, seconds=LONG_SECONDS) for number in range(30)]


def answers(scene: Scene, kind: str, times: int = 1) -> set[tuple[str, str]]:
    rng = np.random.default_rng(3)
    return {(question.text, question.answer) for question in (ask(kind, scene, rng) for _ in range(times))}


def answer(scene: Scene, kind: str) -> str:
    ((_, found),) = answers(scene, kind)
    return found


def blobs(frame: np.ndarray, colour: str) -> tuple[int, np.ndarray]:
    """How many pixels are near this colour, and their mean place (x, y)."""
    near = np.abs(frame / 255 - np.array(RGB[colour])).max(-1) < 0.15
    near = ndimage.binary_opening(near)
    rows, columns = np.nonzero(near)
    return len(rows), np.array([columns.mean(), rows.mean()]) if len(rows) else np.zeros(2)


def loud(scene: Scene) -> list[tuple[float, float]]:
    """Stretches of sound, by its envelope alone: start and end in seconds."""
    wave = waveform(scene.sound).astype(float)
    power = ndimage.uniform_filter1d(wave**2, 160)
    labels, count = ndimage.label(power > 0.02 * power.max())
    found = [np.nonzero(labels == number + 1)[0] for number in range(count)]
    merged: list[list[int]] = []
    for run in found:
        if merged and run[0] - merged[-1][1] < 0.03 * RATE:
            merged[-1][1] = int(run[-1])
        else:
            merged.append([int(run[0]), int(run[-1])])
    return [(start / RATE, end / RATE) for start, end in merged]


def test_a_seed_draws_the_same_scene_frames_and_sound_again():
    first, again = (Scene.draw(np.random.default_rng(5), held_out=True) for _ in range(2))
    assert first == again
    assert np.array_equal(frames(first.picture), frames(again.picture))
    assert np.array_equal(waveform(first.sound), waveform(again.sound))


def test_some_frames_are_those_of_all():
    picture = SCENES[0].picture
    which = np.array([2, 17, 31])
    assert np.array_equal(frames(picture, which), frames(picture)[which])


def test_splits_share_no_combination():
    rng = np.random.default_rng(0)
    held_out, rest = ({Scene.draw(rng, held_out=h).combination for _ in range(1500)} for h in (True, False))
    assert not held_out & rest
    assert len(held_out) > 250


def test_half_of_the_scenes_fit():
    rng = np.random.default_rng(0)
    share = np.mean([Scene.draw(rng, held_out=False).fits for _ in range(800)])
    assert 0.45 < share < 0.55


@pytest.mark.parametrize("scene", SCENES[:30])
def test_the_picture_shows_the_colour_moving_as_the_answers_say(scene):
    colour, way, rest = (answer(scene, kind) for kind in ("colour", "direction", "rest"))
    shown = frames(scene.picture)
    places = []
    for frame in shown[[0, len(shown) // 2, -1]]:
        count, place = blobs(frame, colour)
        assert count > 60
        places.append(place)
    start, middle, end = places
    axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[way]
    assert sign * (end - start)[axis] > 0.25 * SIDE
    assert abs((end - start)[1 - axis]) < 2
    early, late = sign * (middle - start)[axis], sign * (end - middle)[axis]
    assert {"first": early < 0.7 * late, "last": late < 0.7 * early, "never": 0.8 < early / late < 1.25}[rest]


@pytest.mark.parametrize("scene", SCENES[:30])
def test_the_sound_has_the_beeps_and_the_knock_that_the_answers_say(scene):
    parts = loud(scene) if not scene.sound.silent else []
    beeps = [part for part in parts if part[1] - part[0] > 0.12]
    knocks = [part for part in parts if part[1] - part[0] < 0.1]
    assert answer(scene, "count") == ("zero", "one", "two", "three", "four")[len(beeps)]
    told = answer(scene, "knock")
    assert (told == "never") == (not knocks)
    if knocks:
        assert told == ("before" if knocks[0][0] < beeps[0][0] else "after")
    assert max((end for _, end in parts), default=0) < LAST_SOUND + 0.05


@pytest.mark.parametrize("scene", SCENES[:30])
def test_the_pitch_is_the_spectrums(scene):
    if scene.sound.silent:
        assert answer(scene, "pitch") == "none"
        return
    start, length = scene.sound.beeps[0]
    cut = waveform(scene.sound)[int(start * RATE) : int((start + length) * RATE)]
    power = np.abs(np.fft.rfft(cut * np.hanning(len(cut)))) ** 2
    hertz = np.fft.rfftfreq(len(cut), 1 / RATE)
    loudest = hertz[power.argmax()]
    nearest = min({"low": 300, "mid": 800, "high": 2200}.items(), key=lambda item: abs(np.log(loudest / item[1])))
    assert answer(scene, "pitch") == nearest[0]


@pytest.mark.parametrize("scene", LONG)
def test_in_a_long_clip_shape_and_beeps_have_four_seconds_each(scene):
    shown, (start, end) = frames(scene.picture), scene.picture.motion_span
    assert len(shown) == LONG_SECONDS * FPS
    assert end - start == SECONDS
    colour = answer(scene, "colour")
    places = [
        blobs(shown[min(int(second * FPS), len(shown) - 1)], colour)[1] for second in (0, start, end, LONG_SECONDS)
    ]
    assert np.abs(places[0] - places[1]).max() < 2
    assert np.abs(places[2] - places[3]).max() < 2
    assert np.abs(places[2] - places[1]).max() > 0.25 * SIDE
    parts = loud(scene) if not scene.sound.silent else []
    said = answer(scene, "when")
    assert (said == "never") == (not parts)
    if parts:
        begins = parts[0][0] // SECONDS * SECONDS
        assert parts[-1][1] < begins + SECONDS
        assert said == ("together" if start == begins else "before" if start < begins else "after")


def test_every_order_occurs_in_long_clips():
    assert {scene.when for scene in LONG} >= {"before", "after", "together"}


def test_probes_are_true_of_what_is_there_and_of_nothing_else():
    for scene in SCENES:
        there = {" ".join(pair) for pair in scene.picture.objects}
        for text, said in answers(scene, "see", 12):
            assert (said == "yes") == any(thing in text for thing in there)
        for text, said in answers(scene, "is", 12):
            own = {scene.picture.colour, f"a {scene.picture.shape}"}
            assert (said == "yes") == any(text == f"is the moving shape {thing}?" for thing in own)
        heard = {scene.sound.timbre} if scene.sound.beeps else set()
        heard |= {"knock"} if scene.sound.knock != "never" else set()
        for text, said in answers(scene, "hear", 12):
            assert (said == "yes") == any(f"a {thing}" in text for thing in heard)


def test_the_rule_ties_shapes_to_sounds():
    for scene in SCENES:
        assert answer(scene, "sound-of") == FITS[scene.picture.shape]
        assert (answer(scene, "fits") == "yes") == (answer(scene, "sound-of") == answer(scene, "timbre"))
        assert (answer(scene, "shape-of") == "none") == scene.sound.silent


def test_a_caption_tells_what_the_other_answers_tell():
    for scene in SCENES:
        told = caption(scene)
        for kind in ("colour", "shape", "direction", "timbre"):
            assert re.search(rf"\b{answer(scene, kind)}\b", told)
        for kind in ("pitch", "count"):
            assert scene.sound.silent or re.search(rf"\b{answer(scene, kind)}\b", told)


def test_every_word_is_among_the_sentences():
    words = set(re.findall(r"\w+|[^\w\s]", " ".join(sentences())))
    for scene in SCENES:
        for kind in KINDS:
            for text, said in answers(scene, kind, 4):
                assert set(re.findall(r"\w+|[^\w\s]", f"{text} {said}")) <= words


def test_a_clip_in_memory_and_in_a_file_are_alike(tmp_path):
    for number, scene in enumerate(SCENES[:3]):
        memory = clip(scene)
        write(scene, tmp_path / f"{number}.mp4")
        assert (tmp_path / f"{number}.mp4").stat().st_size < 60_000
        assert memory.video is not None
        assert memory.video.frames == SECONDS * FPS
        ours = waveform(scene.sound)
        off, theirs = written(memory, tmp_path / f"{number}.mp4", ours, RATE, [0, 9, 31])
        assert off < 12
        assert np.abs(theirs[: len(ours)] - ours[: len(theirs)]).mean() < 0.02


# --- the task


def sample(family: str, right: str) -> Sample:
    return Sample(id="1", clip=clip(SCENES[0]), question="?", answer=right, family=family)


def test_the_task_asks_every_kind_of_question_about_held_out_scenes():
    samples = list(ToyWorldTask(scenes=3).samples())
    assert len(samples) == 3 * (len(KINDS) - 1)
    assert {one.family for one in samples} == set(FAMILIES)
    assert [one.id for one in samples] == [one.id for one in ToyWorldTask(scenes=3).samples()]


def test_of_long_clips_the_task_asks_what_comes_first_instead_of_rests():
    samples = list(ToyWorldLongTask(scenes=2).samples())
    asked = {one.id.partition("-")[2] for one in samples}
    assert asked == KINDS.keys() - {"rest"}
    assert all(isinstance(one.clip, Clip) and one.clip.duration == LONG_SECONDS for one in samples)


@pytest.mark.parametrize(
    ("family", "right", "said", "grade"),
    [
        ("visual", "red", "Red.", Grade(1)),
        ("visual", "red", "blue", Grade(0)),
        ("visual", "red", "red red", Grade(0)),
        ("visual", "red", " . ", Grade(0, parsed=False)),
        ("caption", "a red circle moves left with two low buzz beeps", "a red circle moves left", Grade(0.5)),
        ("caption", "a red circle moves left in silence", "a red star moves left in silence", Grade(0.75)),
        ("caption", "a red circle moves left in silence", "a red circle moves left with a tone", Grade(0.75)),
        ("caption", "a red circle moves left in silence", "", Grade(0, parsed=False)),
    ],
)
def test_answers_are_graded(family, right, said, grade):
    assert ToyWorldTask().grade(sample(family, right), said) == grade
