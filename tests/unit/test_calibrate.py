"""Statistics over prompts, and the rules that read plans off them."""

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.budgets import Before, Frames, Tokens
from fastav.calibrate import (
    Criterion,
    Evidence,
    Moments,
    Preview,
    Record,
    Store,
    choose,
    prompts_of,
    read_questions,
    start_layer,
)
from fastav.errors import CalibrationError, PlanError
from fastav.flops import DecoderShape, prefill_flops
from fastav.layout import Layout, Modality
from fastav.plan import Plan
from fastav.trace import Trace

SHAPE = DecoderShape(layers=6, hidden=32, intermediate=64, heads=4, kv_heads=2, head_dim=8, vocab=50)


def layout(audio: int, video: int) -> Layout:
    """Two of text, video in frames of two tokens, audio of the same frames, three of text."""
    return Layout.join(
        [
            Layout.of(Modality.TEXT, 2),
            Layout.of(Modality.VIDEO, video, frame=np.arange(video) // 2, second=np.arange(video) / 4),
            Layout.of(Modality.AUDIO, audio, frame=np.arange(audio) // 4, second=np.arange(audio) / 8),
            Layout.of(Modality.TEXT, 3),
        ]
    )


def trace(one: Layout, seed: int = 0) -> Trace:
    make = np.random.default_rng(seed)
    attention, rollout = make.dirichlet(np.full(len(one), 0.3), (2, 3, SHAPE.layers)).astype(np.float32)
    return Trace(
        layout=one, attention=attention, rollout=rollout, selections=(), seconds={"prefill": 1.0, "rollout": 0.5}
    )


def evidence(*traces: Trace) -> Evidence:
    found = Evidence()
    for one in traces:
        found.add(one)
    return found


SEVERAL = [trace(layout(audio, video), seed) for seed, (audio, video) in enumerate([(9, 8), (12, 8), (4, 6)])]


# --- statistics


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_moments_are_those_of_all_arrays_together(lengths, seed):
    make = np.random.default_rng(seed)
    arrays = [make.normal(5, 2, (2, length)) for length in lengths]
    moments = Moments.empty(2)
    for array in arrays:
        moments.add(array, np.arange(array.shape[1]))
    for place in range(max(lengths)):
        values = np.stack([array[:, place] for array in arrays if array.shape[1] > place])
        assert moments.count[place] == len(values)
        assert moments.mean[:, place] == pytest.approx(values.mean(0))
        if len(values) > 1:
            assert moments.spread[:, place] == pytest.approx(values.std(0, ddof=1), abs=1e-9)
        else:
            assert np.isnan(moments.spread[:, place]).all()


def test_profiles_are_means_over_tokens_then_prompts():
    found = evidence(*SEVERAL)
    for axis, modality, bin_of in (
        ("order", Modality.AUDIO, lambda one, tokens: np.arange(len(tokens))),
        ("frame", Modality.VIDEO, lambda one, tokens: one.frame[tokens]),
        ("second", Modality.AUDIO, lambda one, tokens: one.second[tokens].astype(int)),
    ):
        moments = found.profiles[axis, modality]
        for number in range(len(moments.count)):
            means = []
            for one in SEVERAL:
                tokens = np.flatnonzero(one.layout.modality == modality)
                here = tokens[bin_of(one.layout, tokens) == number]
                if len(here):
                    means.append(one.rollout[1, 2, here].mean())
            assert moments.count[number] == len(means)
            assert moments.mean[1, 1, 2, number] == pytest.approx(np.mean(means))


def test_the_weight_of_modalities_and_its_concentration():
    found = evidence(SEVERAL[0])
    one = SEVERAL[0]
    assert found.present() == (Modality.TEXT, Modality.AUDIO, Modality.VIDEO)
    for m in found.present():
        assert found.modalities.mean[0, 0, 3, m] == pytest.approx(one.attention[0, 3, one.layout.modality == m].sum())
    media = np.sort(one.rollout[0, 4, one.layout.modality > 0])[::-1]
    assert found.concentration.mean[1, 0, 4, 0] == pytest.approx(media[:2].sum() / media.sum())  # 10 % of 17, rounded


# --- rules


def brute(found: Evidence, start: int, tokens: int) -> float:
    """The most rollout that any split of the first tokens of each modality holds, by trying all."""
    gains = {}
    for m in (Modality.AUDIO, Modality.VIDEO):
        gains[m] = np.zeros(12)
        for one, where in zip(SEVERAL, found.layouts, strict=True):
            weight = one.rollout[0, start - 1, where.modality == m]
            gains[m][: len(weight)] += weight / len(SEVERAL)
    total = sum(gain.sum() for gain in gains.values())
    splits = ((a, v) for a, v in product(range(13), range(9)) if a + v == tokens)
    return max((gains[Modality.AUDIO][:a].sum() + gains[Modality.VIDEO][:v].sum()) / total for a, v in splits)


@pytest.mark.parametrize("start", [1, 3, 5])
def test_the_first_tokens_are_split_by_the_rollout_they_hold(start):
    found = evidence(*SEVERAL)
    choice = choose(found, SHAPE, Criterion(budget=None, tokens=20, rule="first", start=start))
    keep = choice.plan.steps[0].keep
    assert choice.held is not None
    kept = [12 if keep.audio is None else keep.audio.number, 8 if keep.video is None else keep.video.number]
    assert choice.held <= brute(found, start, sum(kept)) + 1e-6
    # where weights fall from token to token, no split is better
    falling = [trace_of_falling(one.layout) for one in SEVERAL]
    again = evidence(*falling)
    choice = choose(again, SHAPE, Criterion(budget=None, tokens=9, rule="first", start=start))
    assert choice.held == pytest.approx(best_of(falling, start, choice.plan), abs=1e-6)


def trace_of_falling(one: Layout) -> Trace:
    weights = np.zeros(len(one))
    for m, rate in ((Modality.AUDIO, 0.7), (Modality.VIDEO, 0.85), (Modality.TEXT, 0.9)):
        here = one.modality == m
        weights[here] = rate ** np.arange(here.sum())
    rows = np.broadcast_to(weights / weights.sum(), (3, SHAPE.layers, len(one))).astype(np.float32)
    return Trace(layout=one, attention=rows, rollout=rows, selections=(), seconds={})


def best_of(traces: list[Trace], start: int, plan: Plan) -> float:
    keep = plan.steps[0].keep
    numbers = [budget.number if isinstance(budget, Tokens) else 99 for budget in (keep.audio, keep.video)]
    total = sum(min(number, most) for number, most in zip(numbers, (12, 8), strict=True))
    gains = {m: np.zeros(12) for m in (Modality.AUDIO, Modality.VIDEO)}
    for one in traces:
        for m, gain in gains.items():
            weight = one.rollout[0, start - 1, one.layout.modality == m]
            gain[: len(weight)] += weight
    whole = sum(gain.sum() for gain in gains.values())
    a, v = gains[Modality.AUDIO], gains[Modality.VIDEO]
    return max((a[:n].sum() + v[: total - n].sum()) / whole for n in range(min(12, total) + 1) if total - n <= 8)


@pytest.mark.parametrize("rule", ["auto", "even", "first", "frames", "before", "rollout"])
@pytest.mark.parametrize("budget", [0.7, 0.85])
def test_a_plan_takes_no_more_flops_than_its_budget_and_nearly_all_of_it(rule, budget):
    found = evidence(*SEVERAL)
    choice = choose(found, SHAPE, Criterion(budget=budget, rule=rule, start=2))
    ratios = [
        prefill_flops(SHAPE, choice.plan.tokens(one, 6)) / prefill_flops(SHAPE, [len(one)] * 6) for one in found.layouts
    ]
    assert np.mean(ratios) == pytest.approx(choice.flops)
    assert choice.flops <= budget
    if rule != "frames":  # a frame is many tokens
        assert choice.flops > budget - 0.05
    kinds = {"even": Tokens, "first": Tokens, "frames": Frames, "before": Before}
    if choice.rule in kinds:
        (kept,) = {type(b) for b in choice.plan.steps[0].keep.pools().values()}
        assert kept is kinds[choice.rule]
    else:
        assert choice.plan.steps[0].method == "rollout"


def sunk(one: Layout) -> Trace:
    """The first token of each modality holds nearly everything, as where attention has sinks."""
    weights = np.full(len(one), 1e-6)
    for m in (Modality.TEXT, Modality.AUDIO, Modality.VIDEO):
        weights[np.flatnonzero(one.modality == m)[0]] = 1
    rows = np.broadcast_to(weights / weights.sum(), (3, SHAPE.layers, len(one))).astype(np.float32)
    return Trace(layout=one, attention=rows, rollout=rows, selections=(), seconds={})


@pytest.mark.parametrize("rule", ["even", "first"])
@pytest.mark.parametrize("budget", [0.6, 0.7, 0.75])
def test_budgets_are_used_where_few_tokens_hold_nearly_everything(rule, budget):
    found = evidence(*(sunk(layout(64, 400)) for _ in range(2)))
    choice = choose(found, SHAPE, Criterion(budget=budget, rule=rule, start=2))
    assert budget - 0.01 < choice.flops <= budget


@pytest.mark.parametrize("rule", ["even", "first", "frames", "before"])
def test_what_is_held_is_what_the_traces_have_on_tokens_that_stay(rule):
    alike = [trace(layout(12, 8), seed) for seed in range(4)]
    choice = choose(evidence(*alike), SHAPE, Criterion(budget=0.8, rule=rule, start=2))
    held = whole = 0.0
    for one in alike:
        weights, modality = one.rollout[0, 1], one.layout.modality
        there = {frozenset({m}): one.layout.count(m) for m in Modality}
        counts = choice.plan.steps[0].keep.counts(one.layout, there)
        stays = np.ones(len(weights), bool)
        for pool, count in counts.items():
            stays[np.flatnonzero(np.isin(modality, list(pool)))[count:]] = False
        held += float(weights[stays & (modality > 0)].sum())
        whole += float(weights[modality > 0].sum())
    assert choice.held == pytest.approx(held / whole, rel=1e-5)


def test_auto_takes_the_rule_that_holds_most():
    found = evidence(*SEVERAL)
    held = {}
    for rule in ("first", "frames", "before", "auto"):
        held[rule] = choose(found, SHAPE, Criterion(budget=0.75, rule=rule)).held
    assert held["auto"] == pytest.approx(max(held.values()))


def test_an_even_rule_leaves_every_modality_the_same_share_of_its_rollout():
    found = evidence(*(trace_of_falling(one.layout) for one in SEVERAL))
    keep = choose(found, SHAPE, Criterion(budget=0.75, rule="even", start=2)).plan.steps[0].keep
    shares = []
    for m, budget in ((Modality.AUDIO, keep.audio), (Modality.VIDEO, keep.video)):
        assert isinstance(budget, Tokens)
        moments = found.profiles["order", m]
        gains = moments.mean[1, 0, 1] * moments.count / len(SEVERAL)
        shares.append((gains[: budget.number - 1].sum() / gains.sum(), gains[: budget.number].sum() / gains.sum()))
    (low, high), (other_low, other_high) = shares
    assert max(low, other_low) <= min(high, other_high), "one share lies between both"


def test_the_start_by_concentration_is_where_it_stays_high():
    found = evidence(*SEVERAL)
    for values, layer in (([0, 0, 0, 1, 1, 1], 4), ([1, 0, 0.9, 1, 0.2, 1], 5), ([1, 1, 1, 1, 1, 0], 5), ([1] * 6, 1)):
        found.concentration.mean[0, 0, :, 0] = values
        assert start_layer(found, 6, "concentration") == layer
    assert start_layer(found, 6, "middle") == 3
    assert start_layer(found, 6, 2) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 1.2}, "budget must be in"),
        ({"budget": None}, "either a FLOPs budget"),
        ({"budget": 0.5, "tokens": 4}, "either a FLOPs budget"),
        ({"budget": None, "tokens": 0}, "at least 1"),
        ({"drop": 1.0}, "drop must be in"),
        ({"rule": "evne"}, "no rule 'evne'"),
        ({"start": "half"}, "start must be a layer"),
    ],
)
def test_criteria_that_make_no_sense(options, said):
    with pytest.raises(CalibrationError, match=said):
        Criterion(**options)


def test_what_cannot_be_reached_is_refused_with_what_can():
    found = evidence(*SEVERAL)
    with pytest.raises(CalibrationError, match="the least is"):
        choose(found, SHAPE, Criterion(budget=0.1))
    with pytest.raises(CalibrationError, match="a layer from 1 to 5"):
        choose(found, SHAPE, Criterion(start=6))
    text = Layout.of(Modality.TEXT, 5)
    with pytest.raises(CalibrationError, match="audio or video"):
        choose(evidence(trace(text)), SHAPE, Criterion())


# --- what a plan remembers


def test_a_calibrated_plan_fits_its_model_alone(tmp_path):
    plan = choose(evidence(*SEVERAL), SHAPE, Criterion(budget=0.8)).plan
    made = Plan(plan.steps, plan.name, {"model": "tiny", "layers": 6, "hidden": 32, "alpha": 0.5})
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.fingerprint == plan.fingerprint
    again.require("tiny", 6, 32)
    for other in (("other", 6, 32), ("tiny", 7, 32), ("tiny", 6, 64)):
        with pytest.raises(PlanError, match="was calibrated for tiny with 6 layers of width 32"):
            again.require(*other)
    plan.require("anything", 1, 2)
    data = json.loads(made.to_json())
    for broken in ({"model": "tiny"}, "tiny", {"model": 1, "layers": 6, "hidden": 32}):
        with pytest.raises(PlanError, match="origin must name"):
            Plan.from_json(json.dumps(data | {"origin": broken}))


# --- on disk


def record(seed: int = 0) -> Record:
    preview = Preview(
        frames=np.zeros((2, 3, 4, 3), np.uint8), moments=np.array([0.0, 1.0]), peaks=np.ones((2, 5)), duration=4
    )
    one = trace(layout(9, 8), seed)
    selections = ((3, np.array([0, 1, 5])), (4, np.array([0, 5])))
    shown = Trace(
        layout=one.layout, attention=one.attention, rollout=one.rollout, selections=selections, seconds=one.seconds
    )
    return Record(clip="a.mp4", question="what?", trace=shown, preview=preview)


def test_a_store_gives_back_what_it_was_given(tmp_path):
    store, one = Store(tmp_path / "kept"), record()
    store.begin({"model": "tiny", "alpha": 0.5})
    assert not store.has("one")
    store.save("one", one)
    assert store.has("one")
    again = store.load("one")
    assert (again.clip, again.question) == ("a.mp4", "what?")
    for name in ("modality", "second", "frame", "padding"):
        assert np.array_equal(
            getattr(again.trace.layout, name), getattr(one.trace.layout, name), equal_nan=name == "second"
        )
    assert np.array_equal(again.trace.rollout, one.trace.rollout)
    assert [(layer, indices.tolist()) for layer, indices in again.trace.selections] == [(3, [0, 1, 5]), (4, [0, 5])]
    assert again.preview.frames.shape == (2, 3, 4, 3)
    store.begin({"model": "tiny", "alpha": 0.5})
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"calibration.json", "prompts"}
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "calibration.json.7.part").write_text("{")
    Store(tmp_path / "stopped").begin({"model": "tiny"})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(CalibrationError, match="has other files"):
        store.begin({"model": "tiny"})
    other = Store(tmp_path / "kept")
    other.begin({"model": "tiny", "alpha": 0.5})
    with pytest.raises(CalibrationError, match=r"with alpha 0\.5, not 0\.6"):
        other.begin({"model": "tiny", "alpha": 0.6})
    with pytest.raises(CalibrationError, match="no finished calibration"):
        other.result()
    with pytest.raises(CalibrationError, match="no finished calibration"):
        Store(tmp_path / "nowhere").head()


def test_a_damaged_file_is_named(tmp_path):
    store = Store(tmp_path / "kept")
    store.begin({})
    store.save("one", record())
    path = tmp_path / "kept" / "prompts" / "one.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CalibrationError, match=r"one\.npz"):
        store.load("one")


# --- prompts


def test_questions_and_clips_pair_up(tmp_path):
    for name in ("a.mp4", "b.wav", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    text, mapping = tmp_path / "q.txt", tmp_path / "q.json"
    text.write_text("what?\n\n who? \n")
    mapping.write_text(json.dumps({"a.mp4": ["what?"], "b.wav": [{"question": "who?", "answer": "x"}]}))
    every = prompts_of([tmp_path], read_questions(text))
    assert [(one.clip.name, one.question) for one in every] == [
        ("a.mp4", "what?"), ("a.mp4", "who?"), ("b.wav", "what?"), ("b.wav", "who?"),
    ]  # fmt: skip
    own = prompts_of([tmp_path / "b.wav", tmp_path / "a.mp4"], read_questions(mapping))
    text.write_text("\ufeffwhat?", encoding="utf-8")
    assert read_questions(text) == ["what?"], "Windows' editors write a mark before it"
    assert [(one.clip.name, one.question) for one in own] == [("b.wav", "who?"), ("a.mp4", "what?")]
    assert len({one.key for one in every}) == 4
    (tmp_path / "b.wav").write_bytes(b"other")
    assert prompts_of([tmp_path / "b.wav"], ["who?"])[0].key != own[0].key
    assert len(prompts_of([tmp_path, tmp_path / "a.mp4"], ["q", "q"])) == 2, "each pair once"


def test_bad_prompts_are_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    bad = tmp_path / "bad.json"
    for said, call in {
        "the clip .* does not exist": lambda: prompts_of([tmp_path / "c.mp4"], ()),
        "no video or audio files": lambda: prompts_of([tmp_path / "empty"], ()),
        "no clips are given": lambda: prompts_of([], ()),
        "no question about a": lambda: prompts_of([tmp_path / "a.mp4"], {"b.mp4": ["?"]}),
        "must be a list": lambda: prompts_of([tmp_path / "a.mp4"], "why?"),
        "cannot read the questions": lambda: read_questions(tmp_path / "none.txt"),
    }.items():
        with pytest.raises(CalibrationError, match=said):
            call()
    for text, said in {
        "{": "cannot read",
        "[]": "has no questions",
        "[3]": "must be a string",
        '["\\ud800"]': "half of a character",
        '"a"': "has no",
        '["what?", " "]': "a question is empty",
        '{"a.mp4": ["what?", {"question": ""}]}': "a question is empty",
    }.items():
        bad.write_text(text)
        with pytest.raises(CalibrationError, match=said):
            read_questions(bad)
