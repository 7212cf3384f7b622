"""Plans: what they mean, how they travel, what they refuse."""

import json
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.budgets import Before, Frames, Share, Tokens, Unpadded
from fastav.errors import PlanError, UnknownName
from fastav.layout import MEDIA, Layout, Modality
from fastav.plan import Keep, Plan, Step
from fastav.presets import fastav, plus, trim


def layout(text=14, video=676, audio=1496, tail=30):
    return Layout.join(
        [
            Layout.of(Modality.TEXT, text),
            Layout.of(Modality.VIDEO, video, frame=np.arange(video) // 169 * 2),
            Layout.of(Modality.AUDIO, audio, padding=np.arange(audio) >= 800),
            Layout.of(Modality.TEXT, tail),
        ]
    )


budgets = st.one_of(
    st.floats(0.001, 1.0).map(Share),
    st.integers(0, 5000).map(Tokens),
    st.integers(0, 5000).map(Before),
    st.integers(1, 100).map(Frames),
    st.just(Unpadded()),
)
keeps = st.one_of(
    st.builds(Keep, audio=budgets, video=st.none() | budgets),
    st.builds(Keep, media=budgets),
    st.builds(Keep, all=budgets),
)
layers = st.sampled_from(["0", "3", "1/4", "3/4+1..", "middle", "middle+1", "middle+1..", "2..5", "4..", "1..1"])
steps = st.builds(
    Step,
    layers=layers,
    keep=keeps,
    method=st.sampled_from(["position", "last-query", "keep-first"]),
) | st.builds(
    Step,
    layers=layers,
    keep=keeps,
    method=st.just("random"),
    options=st.fixed_dictionaries({"seed": st.integers(0, 9)}),
)
plans = st.builds(Plan, st.lists(steps, max_size=4).map(tuple), st.text(max_size=10))


@given(plans)
def test_json_brings_a_plan_back(plan):
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert back.fingerprint == plan.fingerprint


@settings(deadline=None)
@given(plans, st.integers(0, 20), st.integers(0, 60), st.integers(0, 60), st.integers(1, 20))
def test_a_plan_never_adds_tokens_and_keeps_the_last_one(plan, text, video, audio, tail):
    try:
        tokens = plan.tokens(layout(text, video, audio, tail), 12)
    except PlanError as error:
        assert "pooled" in str(error)  # noqa: PT017
        return
    assert len(tokens) == 12
    assert all(a >= b >= 1 for a, b in zip([text + video + audio + tail, *tokens], tokens, strict=False))


@given(st.integers(0, 100_000), st.integers(0, 99))
def test_a_share_drops_the_floor_of_what_it_drops(n, percent):
    kept = Share((100 - percent) / 100).tokens(layout(0, 0, 0, 1), (), n)
    assert kept == n - floor(n * percent / 100) == n - n * percent // 100


def test_fastav_keeps_what_the_paper_keeps():
    tokens = fastav(Keep(audio=Tokens(10))).tokens(layout(), 28)
    assert tokens[:14] == (2216,) * 14
    assert tokens[14] == 676 + 10 + 44
    media, expected = 686, []
    for _ in range(13):
        media -= media // 5
        expected.append(media + 44)
    assert list(tokens[15:]) == expected


def test_the_papers_other_wording_keeps_positions_below_750():
    cut = fastav(Keep(media=Before(750))).schedule(layout(), 28)[0]
    assert cut.layer == 14
    assert cut.total == 750 + 30


def test_frames_count_only_tokens_of_frames():
    assert Keep(media=Frames(4)).counts(layout(), {frozenset({m}): layout().count(m) for m in Modality}) == {
        frozenset({Modality.AUDIO, Modality.VIDEO, Modality.IMAGE}): 2 * 169
    }


def test_trim_drops_padding_before_the_first_layer():
    assert trim().tokens(layout(), 28) == (2216 - 696,) * 28


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ("1/4", 32, [8]),
        ("3/4", 28, [21]),
        ("1/2", 7, [3]),
        ("1/3", 7, [2]),
        ("3/4+1..", 8, [7]),
        ("0/1..1", 8, [0, 1]),
        ("27/28", 28, [27]),
        ("1/2..5", 8, [4, 5]),
    ],
)
def test_a_fraction_of_the_depth_is_rounded_down(layers, depth, expected):
    step = Step(layers=layers, method="position", keep=Keep(media=Share(0.5)))
    assert list(step.layer_range(depth)) == expected


@pytest.mark.parametrize("layers", ["1/0", "/4", "1/", "1/-4", "1.5/4", "4/4", "middle/2"])
def test_a_fraction_that_names_no_layer_is_refused(layers):
    with pytest.raises(PlanError, match=r"cannot read layers|do not exist"):
        Step(layers=layers, method="position", keep=Keep(media=Share(0.5))).layer_range(8)


def test_without_exemption_text_competes_but_one_token_stays():
    plan = Plan((Step(layers="0", method="position", keep=Keep(all=Tokens(0))),))
    assert plan.tokens(layout(), 4) == (1, 1, 1, 1)
    assert fastav(Keep(audio=Tokens(10)), exempt_text=False).tokens(layout(), 28)[15] == 730 - 146


def test_a_global_cut_at_the_last_layer_leaves_no_fine_ones():
    tokens = fastav(Keep(audio=Tokens(10)), start=27).tokens(layout(), 28)
    assert tokens == (2216,) * 27 + (730,)
    with pytest.raises(PlanError, match="do not exist"):
        fastav(Keep(audio=Tokens(10)), start=28).tokens(layout(), 28)


def test_what_a_layer_runs_on_is_known_by_group():
    layers = fastav(Keep(audio=Tokens(10))).layers(layout(), 28)
    assert layers[14][frozenset({Modality.AUDIO})] == 10
    assert layers[15] == {frozenset({Modality.TEXT}): 44, frozenset(MEDIA): 549}


def test_a_step_may_not_tell_apart_what_an_earlier_one_pooled():
    pooled = Step(layers="2", method="position", keep=Keep(media=Share(0.5)))
    apart = Step(layers="3", method="position", keep=Keep(audio=Tokens(1)))
    with pytest.raises(PlanError, match=r"audio \+ image \+ video, which an earlier step pooled"):
        Plan((pooled, apart)).schedule(layout(), 8)
    assert Plan((apart, Step(layers="4", method="position", keep=Keep(media=Share(0.5))))).schedule(layout(), 8)


def test_the_name_is_not_part_of_the_fingerprint():
    a, b = fastav(Keep(audio=Tokens(10)), name="a"), fastav(Keep(audio=Tokens(10)), name="b")
    assert a.fingerprint == b.fingerprint != fastav(Keep(audio=Tokens(11))).fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Share(0.0), r"in \(0, 1\]"),
        (lambda: Share(1.1), r"in \(0, 1\]"),
        (lambda: Share(float("nan")), r"in \(0, 1\]"),
        (lambda: Tokens(-1), "at least 0"),
        (lambda: Frames(0), "at least 1"),
        (lambda: Keep(audio=Tokens(1), media=Share(0.5)), "twice: audio, media"),
        (lambda: Step(layers="14-", method="position", keep=Keep(audio=Tokens(1))), "cannot read layers '14-'"),
        (lambda: Step(layers="middle", method="position", keep=Keep()), "keeps everything"),
        (lambda: Step(layers="8", method="position", keep=Keep(audio=Tokens(1))).layer_range(8), "do not exist"),
        (lambda: Step(layers="5..3", method="position", keep=Keep(audio=Tokens(1))).layer_range(8), "do not exist"),
        (lambda: fastav(Keep(audio=Tokens(1)), drop=1.0), r"drop must be in \[0, 1\)"),
        (lambda: fastav(Keep(audio=Tokens(1)), start="early"), "start must be a layer number"),
        (lambda: fastav(Keep(audio=Tokens(1)), start="1..2"), "start must be a layer number"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_equal_plans_have_equal_fingerprints():
    a, b = (Plan((Step(layers="1", method="position", keep=Keep(media=Share(x))),)) for x in (1, 1.0))
    assert a == b
    assert a.fingerprint == b.fingerprint


def test_options_are_the_plans_own():
    options = {"seed": 1}
    step = Step(layers="1", method="random", options=options, keep=Keep(media=Share(0.5)))
    options["seed"] = 2
    assert step.options == {"seed": 1}
    with pytest.raises(PlanError, match="no option called 'name'"):
        Step(layers="1", method="random", options={"name": "position"}, keep=Keep(media=Share(0.5)))


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'last-query'"):
        Step(layers="1", method="last-querry", keep=Keep(media=Share(0.5)))


GOOD = json.loads(fastav(Keep(audio=Tokens(10))).to_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fastav_plan": 2}, "version 2"),
        ({"fastav_plan": True}, "version True"),
        ({"steps": {}}, "steps a list"),
        ({"extra": 1}, "has no 'extra'"),
        ({"name": None}, "name must be a string"),
        ({"steps": [{"layers": "1"}]}, "needs 'keep', 'method'"),
        ({"steps": [{**GOOD["steps"][0], "method": "position"}]}, "must be an object with a name"),
        ({"steps": [{**GOOD["steps"][0], "keep": {"sound": {"tokens": 1}}}]}, "has no 'sound'"),
        ({"steps": [{**GOOD["steps"][0], "keep": {"audio": 0.5}}]}, "keep.audio must be one of"),
        ({"steps": [{**GOOD["steps"][0], "keep": {"audio": {"share": "half"}}}]}, "keep.audio: share must be a number"),
        ({"steps": [{**GOOD["steps"][0], "layers": 14}]}, "layers must be a string"),
        ({"steps": [{**GOOD["steps"][0], "keep": {"audio": {"tokens": 1.5}}}]}, "tokens must be a whole number"),
        ({"steps": [{**GOOD["steps"][0], "keep": {"audio": {"tokens": True}}}]}, "tokens must be a whole number"),
        ({"steps": [{**GOOD["steps"][0], "keep": {"audio": {"share": 2}}}]}, "keep.audio: a share must be in"),
        ({"steps": ["fast"]}, "step must be a JSON object"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path, change, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"[" * 100_000, b"1" * 5000, b'{"name": "a", "name": "b"}']
)
def test_what_is_no_plan_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match="No such file"):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize("cache_only", [False, True])
def test_a_plan_that_no_layer_enters_is_refused(cache_only):
    plan = Plan((Step(layers="28..", method="position", keep=Keep(media=Share(0.5)), cache_only=cache_only),))
    for ask in (plan.cuts, plan.cache_cuts):
        assert bool(ask(29)) == (ask == (plan.cache_cuts if cache_only else plan.cuts))
        with pytest.raises(PlanError, match="nothing is pruned"):
            ask(28)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_presets_drop_something_of_the_shallowest_decoders(depth):
    layout = Layout.join([Layout.of(Modality.VIDEO, 20), Layout.of(Modality.AUDIO, 20), Layout.of(Modality.TEXT, 3)])
    for plan in (fastav(Keep(media=Share(0.4))), fastav(Keep(clip=Share(0.4))), plus()):
        assert plan.tokens(layout, depth)[-1] < len(layout)
