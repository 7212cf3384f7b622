"""The parade: the same each time, true to what its answers say, and no answer known without looking and listening."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy import ndimage

from fastav.media import Clip
from fastav.parade import FAMILIES, KINDS, LENGTHS, SECONDS, Scene, ask, caption, clip, facts, frames, sentences, write
from fastav.parade.questions import CLEAR, CLEAR_ACROSS, NOTHING, NUMBERS, Question
from fastav.parade.render import FPS, RGB, SIDE
from fastav.parade.scene import (
    APART,
    AT_ONCE,
    BACKDROPS,
    COLOURS,
    LAST_SOUND,
    PITCHES,
    SOUNDS,
    THINGS,
    Picture,
    Sound,
    is_held_out_look,
    is_held_out_tune,
    third_of,
)
from fastav.parade.sounds import FACTORS, RATE, waveform
from fastav.task import Grade, Sample
from fastav.tasks.parade import ParadeTask
from fastav.tasks.parade_long import ParadeLongTask
from fastav.tasks.parade_minute import ParadeMinuteTask
from support.clip_files import written

SCENES = [Scene.draw(np.random.default_rng(number), held_out=bool(number % 2)) for number in range(40)]
LONG = [Scene.draw(np.random.default_rng(number), LENGTHS[1 + number % 2], held_out=True) for number in range(12)]


def asked(scene: Scene, kind: str, times: int = 20) -> list[Question]:
    rng = np.random.default_rng(3)
    questions = [ask(kind, scene, rng) for _ in range(times)]
    return [question for question in questions if question is not None]


def named(text: str, names: tuple[str, ...]) -> list[str]:
    """The words of a text that are among these names."""
    return [word for word in re.findall(r"\w+", text) if word in names]


def test_a_seed_draws_the_same_scene_frames_and_sound_again():
    first, again = (Scene.draw(np.random.default_rng(5), held_out=True) for _ in range(2))
    assert first == again
    assert np.array_equal(frames(first.picture), frames(again.picture))
    assert np.array_equal(waveform(first.sound), waveform(again.sound))


def test_some_frames_are_those_of_all():
    picture = next(scene.picture for scene in SCENES if scene.picture.shake)
    which = np.array([2, 17, 31])
    assert np.array_equal(frames(picture, which), frames(picture)[which])


@pytest.mark.parametrize("scene", [*SCENES, *LONG])
def test_events_are_short_within_the_clip_and_can_be_told_apart(scene):
    actors, noises = scene.picture.actors, scene.sound.noises
    for events in (actors, noises):
        assert [event.start for event in events] == sorted(event.start for event in events)
        assert min(np.diff([event.start for event in events])) >= 0.4
        assert all(event.start > 0 and (event.end - event.start) / scene.seconds < 0.34 for event in events)
    assert actors[-1].end < scene.seconds
    assert max(noise.end for noise in noises) <= scene.seconds - LAST_SOUND + 1e-6
    assert len({actor.thing for actor in actors}) == len({actor.colour for actor in actors}) == len(actors)
    assert len({noise.sound for noise in noises}) == len(noises)
    for moment in np.arange(0, scene.seconds, 0.1):
        shown = [actor.centre(np.array([moment]))[0] for actor in actors if actor.start <= moment < actor.end]
        gaps = [np.hypot(*(one - other)) for number, one in enumerate(shown) for other in shown[:number]]
        assert min(gaps, default=1) > APART - 0.06  # the least distance is between the moments that drawing looks at
        assert sum(noise.start <= moment < noise.end for noise in noises) <= AT_ONCE
        assert all(0.1 < place < 0.9 for centre in shown for place in centre)


# --- splits


def test_splits_share_no_thing_and_no_sound():
    rng = np.random.default_rng(0)
    looks, tunes = defaultdict(set), defaultdict(set)
    for number in range(600):
        held_out = bool(number % 2)
        scene = Scene.draw(rng, held_out=held_out)
        assert scene.picture.held_out == scene.sound.held_out == held_out
        looks[held_out] |= {(a.thing, a.colour, a.direction, a.place) for a in scene.picture.actors}
        tunes[held_out] |= {(n.sound, n.pitch, n.strokes) for n in scene.sound.noises}
    assert not looks[True] & looks[False]
    assert not tunes[True] & tunes[False]
    assert (len(looks[True]), len(tunes[True])) == (60, 24)
    assert {look[:2] for look in looks[True]} == {look[:2] for look in looks[False]}  # no pair is new by itself
    assert {tune[:2] for tune in tunes[True]} == {tune[:2] for tune in tunes[False]}


def test_for_each_thing_and_colour_and_each_sound_and_pitch_one_way_is_held_out():
    ways = [("left", "top"), ("left", "bottom"), ("right", "top"), ("right", "bottom")]
    ways += [("up", "left"), ("up", "right"), ("down", "left"), ("down", "right")]
    assert {sum(is_held_out_look(t, c, *way) for way in ways) for t in THINGS for c in COLOURS} == {1}
    assert {sum(is_held_out_tune(s, p, n) for n in (1, 2, 3, 4)) for s in SOUNDS for p in PITCHES} == {1}


# --- answers against what is rendered


def stills(scene: Scene, actor_number: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames with a thing, and the same frames of the same picture without it."""
    actors = scene.picture.actors
    actor = actors[actor_number]
    which = np.arange(int(np.ceil(actor.start * FPS)), int(actor.end * FPS - 0.5))
    rest = tuple(one for number, one in enumerate(actors) if number != actor_number)
    fields = {name: getattr(scene.picture, name) for name in Picture.__slots__} | {"actors": rest}
    return frames(scene.picture, which), frames(Picture(**fields), which)


@pytest.mark.parametrize("scene", [scene for scene in [*SCENES[:14], *LONG[:4]] if len(scene.picture.actors) > 1])
def test_a_thing_shows_its_colour_and_moves_as_the_answers_say(scene):
    for number, actor in enumerate(scene.picture.actors):
        shown, without = stills(scene, number)
        changed = np.abs(shown.astype(int) - without).max(-1) > 60
        assert all(np.count_nonzero(one) > 100 for one in changed)
        places = np.array([ndimage.center_of_mass(one) for one in changed])[:, ::-1] / SIDE  # x, y
        way = places[-1] - places[0]
        axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[actor.direction]
        assert sign * way[axis] > 0.1
        assert abs(way[1 - axis]) < 0.1
        across = places[:, 1 - axis].mean()
        assert (across < 0.5) == (actor.place in ("top", "left"))
        pixels = shown[changed].astype(float) / 255
        nearest = np.array([np.abs(pixels - np.array(RGB[colour])).max(-1) for colour in COLOURS])
        near = nearest.min(0) < 0.2
        colours = Counter(COLOURS[index] for index in nearest.argmin(0)[near])
        colours.pop("white", None)  # windows and sails are light
        own = actor.colour if actor.colour != "white" else None
        if own is not None:
            assert colours.most_common(1)[0][0] == own
        else:
            assert (nearest[COLOURS.index("white")] < 0.2).mean() > 0.15


def test_things_look_different():
    shapes = {}
    for scene in SCENES:
        for number, actor in enumerate(scene.picture.actors):
            shown, without = stills(scene, number)
            shapes.setdefault(actor.thing, np.abs(shown[0].astype(int) - without[0]).max(-1).astype(bool).sum())
    assert set(shapes) == set(THINGS)


@pytest.mark.parametrize("scene", [*SCENES[:10], *LONG[:3]])
def test_the_background_moves_so_tokens_of_one_place_differ(scene):
    (empty,) = (frames(Picture(**({n: getattr(scene.picture, n) for n in Picture.__slots__} | {"actors": ()}))),)
    change = np.abs(np.diff(empty.astype(float), axis=0)).mean() / 255
    assert change > 0.015
    assert empty.std((0, 1, 2)).mean() / 255 > 0.02


def test_backdrops_look_different():
    means = defaultdict(list)
    for number in range(120):
        picture = Picture.draw(np.random.default_rng(number), held_out=False)
        one = frames(picture, np.array([0]))[0].astype(float)
        means[picture.backdrop].append((one.mean((0, 1)) / one.mean())[:, None])
    assert set(means) == set(BACKDROPS)


def alone(scene: Scene, number: int) -> np.ndarray:
    """What a noise adds to the sound: the waveform with it alone, without ambience."""
    fields = {name: getattr(scene.sound, name) for name in Sound.__slots__}
    return waveform(Sound(**fields | {"noises": (scene.sound.noises[number],), "level": 0.0}))


@pytest.mark.parametrize("scene", [*SCENES[:12], *LONG[:3]])
def test_strokes_are_as_many_and_when_the_answers_say(scene):
    for number, noise in enumerate(scene.sound.noises):
        wave = alone(scene, number)
        (loud,) = np.nonzero(np.abs(wave) > 0)
        runs = np.split(loud, np.nonzero(np.diff(loud) > 0.1 * RATE)[0] + 1)
        assert len(runs) == noise.strokes
        assert np.allclose([run[0] / RATE for run in runs], noise.starts, atol=0.01)
        assert abs(runs[-1][-1] / RATE - noise.end) < 0.01


def pitch_of(cut: np.ndarray, sound: str) -> float:
    """The mean of the spectrum in octaves; of a voice, whose formants stay, how often the wave repeats in a second."""
    power = np.abs(np.fft.rfft(cut * np.hanning(len(cut)))) ** 2
    if sound == "voice":
        repeats = np.fft.irfft(power)
        shortest, longest = RATE // 300, RATE // 80
        return RATE / (shortest + int(repeats[shortest:longest].argmax()))
    hertz = np.fft.rfftfreq(len(cut), 1 / RATE)
    return float(np.exp((power * np.log(hertz + 1)).sum() / power.sum()))


def test_a_higher_pitch_is_one():
    found = defaultdict(list)
    for number in range(150):
        scene = Scene.draw(np.random.default_rng(number), held_out=bool(number % 2))
        for index, noise in enumerate(scene.sound.noises):
            start = int(noise.start * RATE)
            cut = alone(scene, index)[start : start + int(noise.stroke * RATE)]
            found[noise.sound, noise.pitch].append(pitch_of(cut, noise.sound))
    for sound in SOUNDS:
        low, mid, high = (np.median(found[sound, pitch]) for pitch in FACTORS)
        assert 1.15 * low < mid < high / 1.15, sound


def test_there_is_sound_all_the_time():
    for scene in SCENES:
        power = ndimage.uniform_filter1d(waveform(scene.sound).astype(float) ** 2, RATE // 2)
        assert power[RATE // 4 : -RATE // 4].min() > 1e-6


# --- questions


@pytest.mark.parametrize("scene", [*SCENES, *LONG])
def test_answers_are_true(scene):
    actors = {actor.thing: actor for actor in scene.picture.actors}
    noises = {noise.sound: noise for noise in scene.sound.noises}
    facts_of = {
        "colour": lambda name: actors[name].colour,
        "direction": lambda name: actors[name].direction,
        "side": lambda name: actors[name].place,
        "strokes": lambda name: NUMBERS[noises[name].strokes],
        "pitch": lambda name: noises[name].pitch,
        "seen-when": lambda name: third_of(actors[name].start, actors[name].end, scene.seconds),
        "heard-when": lambda name: third_of(noises[name].start, noises[name].end, scene.seconds),
    }
    for kind, fact in facts_of.items():
        for question in asked(scene, kind):
            (name,) = named(question.text, (*THINGS, *SOUNDS))
            assert question.answer == fact(name)
            event = (actors | noises)[name]
            assert question.third == third_of(event.start, event.end, scene.seconds)
    for question in asked(scene, "thing"):
        (colour,) = named(question.text, COLOURS)
        assert actors[question.answer].colour == colour
    for kind, events in (("seen-end", scene.picture.actors), ("heard-end", scene.sound.noises)):
        for question in asked(scene, kind):
            event = events[0 if "first" in question.text else -1]
            assert question.answer in (getattr(event, "thing", None), getattr(event, "sound", None))
    for kind, order in (("seen-next", list(actors)), ("heard-next", list(noises))):
        for question in asked(scene, kind):
            (name,) = named(question.text, (*THINGS, *SOUNDS))
            later = order[order.index(name) + 1 :]
            assert question.answer == (later[0] if later else NOTHING)
    for question in asked(scene, "before"):
        thing, sound = named(question.text, (*THINGS, *SOUNDS))
        lead = noises[sound].start - actors[thing].start
        assert abs(lead) > CLEAR_ACROSS
        assert question.answer == ("yes" if lead > 0 else "no")
    for kind, given, wanted in (("heard-while", actors, noises), ("seen-while", noises, actors)):
        for question in asked(scene, kind):
            (name,) = named(question.text, (*THINGS, *SOUNDS))
            one = given[name]
            shared = {n: min(one.end, e.end) - max(one.start, e.start) for n, e in wanted.items()}
            together = {n: seconds for n, seconds in shared.items() if seconds > 0}
            assert set(together) == ({question.answer} - {NOTHING})
            assert all(seconds > CLEAR for seconds in together.values())
    for question in asked(scene, "see"):
        (colour,), (thing,) = named(question.text, COLOURS), named(question.text, THINGS)
        assert (question.answer == "yes") == (thing in actors and actors[thing].colour == colour)
    for question in asked(scene, "hear"):
        (sound,) = named(question.text, SOUNDS)
        assert (question.answer == "yes") == (sound in noises)
    (things,), (sounds,) = ({q.answer for q in asked(scene, kind)} for kind in ("things", "sounds"))
    assert (things, sounds) == (NUMBERS[len(actors)], NUMBERS[len(noises)])


def test_evidence_is_in_the_whole_clip_if_it_is_in_several_thirds():
    thirds = {kind: {question.third for scene in SCENES for question in asked(scene, kind)} for kind in KINDS}
    for kind in ("backdrop", "ambience", "things", "sounds", "caption"):
        assert thirds[kind] == {"whole"}
    for kind in ("colour", "strokes", "seen-when", "seen-end"):
        assert thirds[kind] == {"early", "middle", "late"}
    for kind in ("seen-next", "before"):
        assert thirds[kind] == {"early", "middle", "late", "whole"}


def test_a_caption_tells_every_fact_in_its_place():
    for scene in [*SCENES, *LONG]:
        told = facts(caption(scene))
        for number, actor in enumerate(scene.picture.actors):
            seen = [told[kind, number] for kind in ("colour", "thing", "direction")]
            assert seen == [actor.colour, actor.thing, actor.direction]
        for number, noise in enumerate(scene.sound.noises):
            assert [told["strokes", number], told["sound", number]] == [NUMBERS[noise.strokes], noise.sound]
        assert (told["backdrop", 0], told["ambience", 0]) == (scene.picture.backdrop, scene.sound.ambience)
        assert len(told) == 3 * len(scene.picture.actors) + 2 * len(scene.sound.noises) + 2


def test_every_word_is_among_the_sentences():
    words = set(re.findall(r"\w+|[^\w\s]", " ".join(sentences())))
    for scene in [*SCENES, *LONG]:
        for kind in KINDS:
            for question in asked(scene, kind, 4):
                assert set(re.findall(r"\w+|[^\w\s]", f"{question.text} {question.answer}")) <= words


CHANCES = {
    "colour": 1 / 6,
    "thing": 1 / 10,
    "direction": 1 / 4,
    "side": 1 / 4,
    "strokes": 1 / 4,
    "pitch": 1 / 3,
    "backdrop": 1 / 5,
    "ambience": 1 / 4,
    "things": 1 / 3,
    "sounds": 1 / 3,
    "seen-when": 1 / 3,
    "heard-when": 1 / 3,
    "seen-next": 1 / 10,
    "heard-next": 1 / 8,
    "seen-end": 1 / 10,
    "heard-end": 1 / 8,
    "before": 1 / 2,
    "heard-while": 1 / 8,
    "seen-while": 1 / 10,
    "see": 1 / 2,
    "hear": 1 / 2,
}
SCENES_COUNTED = 900


@pytest.mark.parametrize(("seconds", "held_out"), [(SECONDS, False), (SECONDS, True), (LENGTHS[1], True)])
def test_the_most_frequent_answer_is_hardly_more_frequent_than_chance(seconds, held_out):
    rng = np.random.default_rng(1)
    counts = defaultdict(Counter)
    for _ in range(SCENES_COUNTED):
        scene = Scene.draw(rng, seconds, held_out=held_out)
        for kind in CHANCES:
            question = ask(kind, scene, rng)
            counts[kind][question.answer if question else None] += 1
    assert set(CHANCES) == set(KINDS) - {"caption"}
    for kind, answers in counts.items():
        none = answers.pop(None, 0)
        assert none < SCENES_COUNTED / 2
        number = answers.total()
        chance = CHANCES[kind]
        # five standard errors of the share of one answer, and what held-out combinations and `NOTHING` make uneven
        most = chance + 5 * (chance * (1 - chance) / number) ** 0.5 + 0.04
        assert answers.most_common(1)[0][1] / number < most, kind


def test_the_words_of_a_question_hardly_help_to_guess_its_answer():
    rng = np.random.default_rng(2)
    answers = defaultdict(Counter)
    for _ in range(2000):
        scene = Scene.draw(rng, held_out=False)
        for kind in ("colour", "thing", "direction", "side", "strokes", "pitch", "seen-when", "heard-when", "hear"):
            question = ask(kind, scene, rng)
            assert question is not None
            name = named(question.text, (*THINGS, *SOUNDS, *COLOURS))
            answers[kind, *name][question.answer] += 1
    for (kind, *_), told in answers.items():
        chance = CHANCES[kind]
        # in training a third of the numbers of strokes, at most, is never with a sound and pitch
        most = 1.35 * chance + 5 * (chance * (1 - chance) / told.total()) ** 0.5
        assert told.most_common(1)[0][1] / told.total() < most


# --- files and tasks


def test_a_clip_in_memory_and_in_a_file_are_alike(tmp_path):
    for number, scene in enumerate(SCENES[:2]):
        memory = clip(scene)
        write(scene, tmp_path / f"{number}.mp4")
        assert memory.video is not None
        assert memory.video.frames == SECONDS * FPS
        ours = waveform(scene.sound)
        off, theirs = written(memory, tmp_path / f"{number}.mp4", ours, RATE, [0, 9, 31])
        assert off < 16
        shared = min(len(ours), len(theirs))
        assert np.corrcoef(ours[:shared], theirs[:shared])[0, 1] > 0.8


def test_the_tasks_ask_about_held_out_scenes_and_say_where_the_evidence_is():
    for task, seconds in zip((ParadeTask, ParadeLongTask, ParadeMinuteTask), LENGTHS, strict=True):
        samples = list(task(scenes=2).samples())
        assert [one.id for one in samples] == [one.id for one in task(scenes=2).samples()]
        assert all(isinstance(one.clip, Clip) and one.clip.duration == seconds for one in samples)
        for one in samples:
            told = re.fullmatch(r"\d-([a-z-]+)-(early|middle|late|whole)-(video|audio|both)", one.id)
            assert told is not None
            assert KINDS[told[1]] == one.family
    assert {one.family for one in samples} <= set(FAMILIES)


def sample(family: str, right: str) -> Sample:
    return Sample(id="1", clip=clip(SCENES[0]), question="?", answer=right, family=family)


TOLD = "a red dog moves up then a blue car moves left with two bell then one horn before city over rain"


@pytest.mark.parametrize(
    ("family", "right", "said", "grade"),
    [
        ("visual", "red", "Red.", Grade(1)),
        ("visual", "red", "blue", Grade(0)),
        ("visual", "red", "red red", Grade(0)),
        ("visual", "red", " . ", Grade(0, parsed=False)),
        ("caption", TOLD, TOLD, Grade(1)),
        ("caption", TOLD, TOLD.replace("rain", "wind"), Grade(11 / 12)),
        ("caption", TOLD, TOLD.replace("red dog", "blue dog").replace("blue car", "red car"), Grade(10 / 12)),
        ("caption", TOLD, TOLD.replace(" then a blue car moves left", ""), Grade(9 / 12)),
        ("caption", TOLD, TOLD.replace("left with", "left then a white fish moves up with"), Grade(12 / 15)),
        ("caption", TOLD, "", Grade(0, parsed=False)),
    ],
)
def test_answers_are_graded(family, right, said, grade):
    assert ParadeTask().grade(sample(family, right), said) == grade
