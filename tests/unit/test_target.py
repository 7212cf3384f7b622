"""Targets: what a plan costs in all, and the numbers of tokens that follow."""

import json
from math import ceil, exp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastav.budgets import Before, Between, Frames, Share, Tokens, Unpadded
from fastav.errors import PlanError
from fastav.flops import DecoderShape, kv_bytes, prefill_flops
from fastav.layout import Layout, Modality
from fastav.plan import Keep, Plan, Step
from fastav.presets import fastav
from fastav.recipes import recipe
from fastav.registry import RECIPES
from fastav.retention import mean_retention
from fastav.target import Target

DEPTH = 12
SHAPE = DecoderShape(layers=DEPTH, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocab=100)
MEDIA = frozenset({Modality.AUDIO, Modality.VIDEO, Modality.IMAGE})


def layout(video=400, audio=200, image=0, text=20):
    return Layout.join(
        [
            Layout.of(Modality.TEXT, 5),
            Layout.of(Modality.VIDEO, video, frame=np.arange(video) // 20),
            Layout.of(Modality.AUDIO, audio, padding=np.arange(audio) >= 150),
            Layout.of(Modality.IMAGE, image),
            Layout.of(Modality.TEXT, text),
        ]
    )


def retention(plan, prompt, depth=DEPTH):
    """The definition, literally."""
    kept = [sum(n for label, n in layer.items() if label != "text") for layer in plan.by_layer(prompt, depth)]
    return sum(kept) / (depth * prompt.count(*MEDIA))


def step(layers, method="position", **keep):
    return Step(layers=layers, method=method, keep=Keep(**keep))


layouts = st.builds(layout, st.integers(1, 500), st.integers(0, 300), st.integers(0, 50), st.integers(1, 50))
shares = st.floats(0.01, 0.99)
shapes = st.sampled_from(
    [
        Plan((step("0", video=Share(0.3), audio=Share(0.7), image=Share(0.5)),), "first"),
        Plan((step("2", media=Share(0.5)), step("6..", media=Share(0.8))), "fastv and on"),
        Plan((step("1", media=Tokens(40)), step("9", media=Tokens(0))), "late removal"),
        Plan((step("0", video=Frames(3), audio=Before(450), image=Share(0.1)), step("8", media=Share(0.1))), "mixed"),
        Plan((step("3", clip=Share(0.5), image=Share(0.5)), step("5", all=Share(0.9))), "text too"),
    ]
)


@settings(max_examples=60, deadline=None)
@given(shapes, layouts, shares)
def test_the_mean_retention_is_the_target_or_just_below_or_the_plan_says_why_not(plan, prompt, share):
    aimed = plan.retaining(share)
    n_pools, n = sum(len(one.keep.pools()) for one in plan.steps), prompt.count(*MEDIA)
    try:
        kept = retention(aimed, prompt)
    except PlanError as error:
        assert "cannot be met" in str(error) or "no known retention" in str(error)  # noqa: PT017
        return
    assert kept <= share + n_pools / n + 1e-9
    if kept > share + 1e-9:  # only where a rounded-up token of each pool is too much already
        assert n * share < 2 * n_pools * DEPTH
    assert kept >= share - n_pools * DEPTH / (n * DEPTH) - 1e-9


@settings(max_examples=40, deadline=None)
@given(shapes.filter(lambda plan: plan.name != "text too"), layouts, shares, shares)
def test_a_higher_target_keeps_no_fewer_tokens(plan, prompt, one, other):
    low, high = sorted([one, other])
    try:
        fewer, more = (plan.retaining(share).tokens(prompt, DEPTH) for share in (low, high))
    except PlanError:
        return
    assert all(a <= b for a, b in zip(fewer, more, strict=True))


def test_whole_tokens_leave_at_most_one_per_pool_between_target_and_cost():
    for share in (0.2, 0.25, 0.35, 0.5):
        assert retention(recipe(f"divprune@r={share}"), layout()) == pytest.approx(share, abs=2 / 600)
        kept = retention(recipe(f"fastv@r={share}"), layout())
        assert share - 1 / 600 < kept <= share


def test_budgets_keep_their_proportions():
    plan = Plan((step("0", video=Share(0.25), audio=Share(0.5)),)).retaining(0.3)
    (cut,) = plan.schedule(layout(video=4000, audio=4000), DEPTH)
    video, audio = (cut.counts[frozenset({m})] / 4000 for m in (Modality.VIDEO, Modality.AUDIO))
    assert video + audio == pytest.approx(0.6, abs=1e-3)
    assert np.log(video) / np.log(audio) == pytest.approx(np.log(0.25) / np.log(0.5), abs=1e-2)


def test_an_effort_of_a_half_is_the_plan_itself():
    plan = Plan((step("0", video=Share(0.3)), step("4..", media=Share(0.8))))
    own = retention(plan, layout())
    assert plan.retaining(own + 1e-9).tokens(layout(), DEPTH) == plan.tokens(layout(), DEPTH)


def test_padding_and_removals_stay_as_they_are():
    plan = Plan((step("0", "unpadded", audio=Unpadded()), step("0", video=Share(0.5)), step("9", media=Tokens(0))))
    layers = plan.retaining(0.4).by_layer(layout(), DEPTH)
    assert layers[0]["audio"] == 150
    assert "media" not in layers[9]


def test_bounds_are_shares_of_what_enters_the_decoder():
    plan = Plan(
        (
            step("0", video=Between(0.5, 0.5), audio=Between(1, 1)),
            step("4", media=Between(0.75, 1)),
            step("8", media=Between(0, 1)),
        ),
        target=Target(retention=0.45),
    )
    layers = plan.by_layer(layout(), DEPTH)
    assert (layers[0]["video"], layers[0]["audio"]) == (200, 200)
    first, second = layers[4]["media"], layers[8]["media"]
    dropped = 1 - first / 400, 1 - second / 400
    assert dropped[1] == pytest.approx(4 * dropped[0], abs=0.01)
    assert retention(plan, layout()) == pytest.approx(0.45, abs=1 / 600)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 300), shares, shares, shares)
def test_a_total_is_shared_out_in_proportion(video, audio, of_video, of_audio, total):
    prompt = layout(video, audio)
    keep = Keep(video=Share(of_video), audio=Share(of_audio), total=Share(total))
    counts = keep.counts(prompt, {frozenset({m}): prompt.count(m) for m in Modality})
    kept = counts[frozenset({Modality.VIDEO})], counts[frozenset({Modality.AUDIO})]
    wanted = ceil(total * (video + audio) - 1e-9)
    assert wanted - 1 <= sum(kept) <= wanted + 2  # each pool is rounded up
    weights = ceil(of_video * video), ceil(of_audio * audio)
    if kept[0] < video and kept[1] < audio:
        assert abs(kept[0] * weights[1] - kept[1] * weights[0]) <= max(weights)


def test_a_target_by_modality_solves_each_alone():
    plan = Plan((step("0", audio=Share(0.5), video=Share(0.5)), step("6", audio=Share(0.5), video=Share(0.5))))
    aimed = plan.retaining({"audio": 0.6, "video": 0.2})
    layers = aimed.layers(layout(), DEPTH)
    for modality, share in ((Modality.AUDIO, 0.6), (Modality.VIDEO, 0.2)):
        n = layout().count(modality)
        kept = sum(layer[frozenset({modality})] for layer in layers) / (n * DEPTH)
        assert share - 2 / n <= kept <= share
    only = plan.retaining({"video": 0.2}).layers(layout(), DEPTH)
    assert [layer[frozenset({Modality.AUDIO})] for layer in only] == [100] * 6 + [50] * 6


def test_bounds_take_targets_by_modality_of_prompts_with_and_without_sound():
    keep = {"audio": Between(0, 1), "video": Between(0, 0.8)}
    aimed = Plan((step("0", **keep),), target=Target(retention={"audio": 0.5, "video": 0.2}))
    assert aimed.by_layer(layout(), DEPTH)[0] == {"text": 25, "video": 80, "audio": 100}
    assert aimed.by_layer(layout(audio=0), DEPTH)[0] == {"text": 25, "video": 80}
    with pytest.raises(PlanError, match="has no target"):
        Plan((step("0", **keep),), target=Target(retention={"audio": 0.5}))
    with pytest.raises(PlanError, match="couples modalities"):
        Plan((step("0", **keep, total=Share(0.5)),), target=aimed.target)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_targets_of_flops_and_kv_bytes_are_met_in_the_decoder(share):
    plan, prompt = Plan((step("1", media=Share(0.5)), step("6", media=Share(0.5)))), layout()
    full = [len(prompt)] * DEPTH
    flops = plan.aiming_at(Target(flops=share)).for_decoder(SHAPE).tokens(prompt, DEPTH)
    assert share - 0.01 < prefill_flops(SHAPE, flops) / prefill_flops(SHAPE, full) <= share
    stored = plan.aiming_at(Target(kv_bytes=share)).for_decoder(SHAPE).cache_tokens(prompt, DEPTH)
    assert share - 0.01 < kv_bytes(SHAPE, stored) / kv_bytes(SHAPE, full) <= share


def test_cache_only_plans_take_a_target_of_kv_bytes_and_none_of_retention():
    plan = recipe("snapkv@kv=0.3").for_decoder(SHAPE)
    stored = plan.cache_tokens(layout(), DEPTH)
    assert kv_bytes(SHAPE, stored) / kv_bytes(SHAPE, [len(layout())] * DEPTH) == pytest.approx(0.3, abs=0.01)
    assert plan.tokens(layout(), DEPTH) == (len(layout()),) * DEPTH
    with pytest.raises(PlanError, match=r"go down to 100\.0%"):
        recipe("snapkv@r=0.3").tokens(layout(), DEPTH)


def test_the_same_plan_fits_decoders_of_other_shapes():
    wide = DecoderShape(layers=DEPTH, hidden=2048, intermediate=8192, heads=4, kv_heads=2, head_dim=16, vocab=100)
    plan, prompt = recipe("fastv@flops=0.5"), layout()
    one, other = (plan.for_decoder(shape).tokens(prompt, DEPTH) for shape in (SHAPE, wide))
    for shape, tokens in ((SHAPE, one), (wide, other)):
        assert prefill_flops(shape, tokens) / prefill_flops(shape, [len(prompt)] * DEPTH) == pytest.approx(
            0.5, abs=0.01
        )
    assert one != other
    with pytest.raises(PlanError, match="needs the decoder's shape"):
        plan.tokens(prompt, DEPTH)


@pytest.mark.parametrize("name", ["fastav", "vtw", "evs"])
def test_an_unreachable_target_says_how_far_the_plan_can_go(name):
    plan = fastav(Keep(audio=Tokens(10))) if name == "fastav" else recipe(name)
    with pytest.raises(PlanError, match=r"target of retention 0\.2 .* cannot be met: its budgets can go down to"):
        plan.retaining(0.2).tokens(layout(), DEPTH)
    with pytest.raises(PlanError, match=r"cannot be met: its fixed steps leave 50\.0%"):
        recipe("vtw@r=0.9").tokens(layout(), DEPTH)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_takes_a_target_or_says_why_not(name):
    prompt = layout()
    try:
        plan = recipe(f"{name}@r=0.6")
        kept = retention(plan, prompt, 28)
    except PlanError as error:
        assert "cannot be met" in str(error)  # noqa: PT017
        return
    assert plan.name == f"{name}@r=0.6"
    assert kept == pytest.approx(0.6, abs=0.02)


def test_prompts_without_media_are_left_alone():
    assert recipe("divprune@r=0.1").tokens(Layout.of(Modality.TEXT, 9), DEPTH) == (9,) * DEPTH


@given(st.sampled_from([Target(retention=0.25), Target(flops=0.4), Target(retention={"audio": 0.5, "video": 0.2})]))
def test_targets_travel_in_json_and_in_names(target):
    plan = Plan((step("0", video=Share(0.3), audio=Between(0.1, 0.9)),), "mine", target=target)
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert back.fingerprint == plan.fingerprint != Plan(plan.steps, target=Target(flops=0.9)).fingerprint
    assert Target.from_suffix(target.suffix) == target
    assert plan.aiming_at(target).name == f"mine@{target.suffix}"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ({}, "must be one of retention, flops, kv_bytes"),
        ({"retention": 0.2, "flops": 0.3}, "must be one of"),
        ({"retention": 0}, r"a share in \(0, 1\]"),
        ({"retention": "much"}, r"a share in \(0, 1\]"),
        ({"retention": True}, r"a share in \(0, 1\]"),
        ({"retention": {}}, "by modality must name some"),
        ({"retention": {"text": 0.5}}, "by modality must name some"),
        ({"flops": {"audio": 0.5}}, r"a share in \(0, 1\]"),
        ({"speed": 2}, "must be one of"),
        ([0.2], "must be one of"),
    ],
)
def test_bad_targets_are_refused(target, reason):
    data = json.loads(recipe("fastv").to_json()) | {"target": target}
    with pytest.raises(PlanError, match=reason):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("suffix", ["r=", "r=x", "speed=2", "r=audio:", "r=0.2+0.3", "0.3@r=0.2", "r=nan"])
def test_bad_suffixes_are_refused(suffix):
    with pytest.raises(PlanError, match=r"is no target|a share in \(0, 1\]"):
        recipe(f"fastv@{suffix}")


def test_plans_that_contradict_their_target_are_refused():
    with pytest.raises(PlanError, match="between bounds needs a plan with a target"):
        Plan((step("0", video=Between(0.1, 0.9)),))
    with pytest.raises(PlanError, match="a budget of its own for audio"):
        recipe("fastv").retaining({"audio": 0.2})
    with pytest.raises(PlanError, match="couples modalities"):
        recipe("seats@r=audio:0.5+video:0.2")
    with pytest.raises(PlanError, match="without steps"):
        Plan().retaining(0.5)
    with pytest.raises(PlanError, match="total without budgets"):
        Keep(total=Share(0.5))


def test_mean_retention_counts_pools_and_does_not_guess():
    assert mean_retention([{"text": 9, "media": 10}, {"text": 9}], {"text": 9, "audio": 4, "video": 6}) == 0.5
    assert mean_retention([{"all": 10}], {"text": 4, "video": 6}) is None
    assert mean_retention([{"text": 4}], {"text": 4}) is None


LIKE_QWEN = Layout.join(
    [
        Layout.of(Modality.TEXT, 20),
        *(
            Layout.of(modality, n, frame=np.full(n, 2 * k), second=np.full(n, 2.0 * k))
            for k in range(30)
            for modality, n in ((Modality.VIDEO, 300), (Modality.AUDIO, 50))
        ),
        Layout.of(Modality.TEXT, 30),
    ]
)


@pytest.mark.parametrize(
    ("share", "video", "audio"), [(0.35, 0.3, 0.65), (0.25, 0.2, 0.55), (0.15, 0.1, 0.45), (0.1, 0.06, 0.35)]
)
def test_seats_follows_the_papers_settings(share, video, audio):
    """With six tokens of video to one of sound, as of Qwen2.5-Omni, the paper's ratios mean its retention."""
    plan = recipe(f"seats@r={share}")
    layers = plan.by_layer(LIKE_QWEN, 28)
    n = {label: count for label, count in LIKE_QWEN.by_modality().items() if label != "text"}
    assert layers[0]["video"] / n["video"] == pytest.approx(1.4 * video, rel=0.03)
    assert layers[0]["audio"] / n["audio"] == pytest.approx(min(1, 1.4 * audio), rel=0.03)
    total = sum(n.values())
    kept = [sum(count for label, count in layer.items() if label != "text") for layer in layers]
    assert sum(kept) / (28 * total) == pytest.approx(share, abs=1e-3)
    assert kept[15] == pytest.approx(1.4 * share * total, abs=2)
    dropped = [kept[15] - kept[16], kept[17] - kept[18], kept[19] - kept[20]]
    assert dropped[1] / dropped[0] == pytest.approx(exp(1), rel=0.02)
    assert dropped[2] / dropped[1] == pytest.approx(exp(1), rel=0.02)
    assert set(kept[23:]) == {0} != {kept[22]}


@pytest.mark.parametrize("share", [0.08, 0.2, 0.5, 0.7])
def test_seats_meets_retentions_between_and_beyond_the_papers(share):
    assert retention(recipe(f"seats@r={share}"), LIKE_QWEN, 28) == pytest.approx(share, abs=2e-3)
    assert retention(recipe(f"seats@r={share}"), layout(), 12) == pytest.approx(share, abs=1e-2)
