"""From rows to a report, and to Markdown and a chart of it."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastav.errors import FastAVError, UnknownName
from fastav.evaluate import Results, Row, chart, markdown, merge, report
from fastav.evaluate.chart import Point, front
from fastav.evaluate.evaluation import choose_samples
from fastav.evaluate.labels import Box, place_labels
from fastav.task import Sample

PLANS = {"none": [], "half": ["..."], "<b>|odd": ["..."]}
SCORES = {"none": [1, 1, 0, 1], "half": [1, 0, 0, 1], "<b>|odd": [0.5, 0.25, 0, 1]}


def stored(scores=SCORES, task="t", **changes) -> Results:
    run = {
        "task": task,
        "model": "m",
        "device": "cpu",
        "dtype": "float32",
        "plans": {name: {"fingerprint": name, "steps": PLANS[name]} for name in scores},
        "families": ["second", "first"],
        "commit": "abc1234",
        "versions": {"fastav": "1"},
        "machine": {"cpu": "a cpu"},
    }
    rows = [
        Row(
            task=task,
            sample=str(number),
            family=("first", "second")[number % 2],
            plan=plan,
            fingerprint=plan,
            gold="x",
            answer="y",
            score=score,
            parsed=number != 2,
            flops={"full": 100, "pruned": 100 if plan == "none" else 50 + number},
            kv_bytes={"full": 10, "pruned": 10 if plan == "none" else 4},
            seconds={"prefill": 0.1 * (number + 1), "decode": 2.0},
            new_tokens=number,
        )
        for plan, values in scores.items()
        for number, score in enumerate(values)
    ]
    return Results(runs=(run | changes,), rows=tuple(rows))


def test_a_report_by_plan_and_family():
    found = report(stored())
    assert found["reference"] == "none"
    assert found["samples"] == 4
    half = found["plans"]["half"]["all"]
    assert half["n"] == 4
    assert half["score"] == 0.5
    assert half["stderr"] == pytest.approx(0.25)
    assert half["interval"] == [pytest.approx(0.15004, abs=1e-5), pytest.approx(0.84996, abs=1e-5)]
    assert half["unparsed"] == 1
    assert half["flops_ratio"] == pytest.approx(0.515)
    assert half["kv_ratio"] == pytest.approx(0.4)
    assert half["seconds"] == {"prefill": pytest.approx(0.25), "decode": 2.0}
    assert half["new_tokens"] == 1.5
    assert half["against_reference"]["points"] == -25
    assert half["against_reference"]["p"] == 1
    assert found["plans"]["none"]["all"]["against_reference"] is None
    assert found["plans"]["<b>|odd"]["all"]["against_reference"]["p"] is None
    assert list(found["plans"]["half"]["families"]) == ["second", "first"]
    assert found["plans"]["half"]["families"]["first"]["score"] == 0.5
    assert found["plans"]["half"]["families"]["second"]["against_reference"]["points"] == -50


def test_failures_are_counted_and_left_out_on_both_sides():
    whole = stored()
    rows = tuple(
        replace(row, error="why", score=0) if row.key in (("0", "none"), ("1", "half")) else row for row in whole.rows
    )
    found = report(replace(whole, rows=rows))
    half = found["plans"]["half"]["all"]
    assert (half["n"], half["errors"]) == (3, 1)
    assert half["score"] == pytest.approx(2 / 3)
    assert half["against_reference"]["n"] == 2  # the samples that both have answered
    assert half["against_reference"]["points"] == 0
    assert "half: 1 of 4 failed and are left out" in markdown(found)


def test_a_score_is_written_with_an_interval_that_has_a_width():
    found = report(stored({"none": [1, 1, 1, 1], "half": [1, 0, 0, 1]}))
    assert "| none | 4 | 100.0 [51.0, 100.0] |" in markdown(found)
    assert "| half | 4 | 50.0 [15.0, 85.0] |" in markdown(found)
    assert "±" not in markdown(found)


def test_a_report_of_no_rows_and_of_failures_only():
    whole = stored()
    for rows in ((), tuple(replace(row, error="why") for row in whole.rows)):
        found = report(replace(whole, rows=rows))
        assert found["plans"]["none"]["all"]["score"] is None
        assert "| none | 0 | - |" in markdown(found)
        assert b"no answers yet" in chart([found])


def test_without_an_unpruned_plan_nothing_is_compared():
    found = report(stored({"half": SCORES["half"]}))
    assert found["reference"] is None
    assert found["plans"]["half"]["all"]["against_reference"] is None
    assert b"unpruned 5" not in chart([found])


def test_a_task_s_own_metrics_are_shown():
    found = report(stored(), {"half": {"all": {"f1": 0.25, "hits": 1234}}})
    assert "| f1 | hits |" in markdown(found)
    assert "| 0.250 | 1,234 |" in markdown(found)


def test_answers_are_compared_with_the_unpruned_ones():
    whole = stored()
    changed = {"0": {"answer": "Y!", "kl": {"mean": 0.5, "max": 2.0}}, "1": {"answer": "z"}}
    rows = tuple(
        replace(row, **({"kl": {"mean": 0.1, "max": 0.2}} | changed.get(row.sample, {}))) if row.plan == "half" else row
        for row in whole.rows
    )
    found = report(replace(whole, rows=rows))
    half = found["plans"]["half"]["all"]["agreement"]
    assert half["n"] == 4
    assert half["exact"]["mean"] == 0.5
    assert half["rouge_l"]["mean"] == 0.75
    assert half["kl"]["mean"] == pytest.approx(0.2)
    assert half["kl"]["max"] == 2
    assert found["plans"]["none"]["all"]["agreement"] is None
    assert found["plans"]["<b>|odd"]["all"]["agreement"]["kl"] is None
    assert "| half | 50.0 [15.0, 85.0] | 75.0 [" in markdown(found)


def test_files_of_one_model_and_task_are_one():
    one, other = stored({"none": [1, 0]}), stored({"none": [0], "half": [1, 1]}, commit="def5678")
    (both,) = merge([one, other])
    assert {row.key: row.score for row in both.rows} == {
        ("0", "none"): 0,
        ("1", "none"): 0,
        ("0", "half"): 1,
        ("1", "half"): 1,
    }
    assert "commit abc1234 and commit def5678" in markdown(report(both))
    assert len(merge([one, stored(task="other")])) == 2


def test_two_plans_of_one_name_are_refused():
    other = stored()
    plans = other.runs[0]["plans"] | {"half": {"fingerprint": "else", "steps": ["..."]}}
    with pytest.raises(FastAVError, match="two different plans have the name 'half'"):
        merge([stored(), replace(other, runs=({**other.runs[0], "plans": plans},))])


def test_markdown_is_not_broken_by_a_name():
    lines = markdown(report(stored())).splitlines()
    row = next(line for line in lines if "odd" in line)
    assert row.startswith("| <b>\\|odd | 4 |")
    assert row.replace("\\|", "").count("|") == lines[2].count("|")


def test_a_chart_is_svg_with_every_plan_and_both_colour_schemes():
    drawing = chart([report(stored()), report(stored(task="other <task>"))])
    tree = ElementTree.fromstring(drawing)
    words = ["".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"m on t", "m on other <task>", "half 50.0", "<b>|odd 43.8", "unpruned 75.0"} <= set(words)
    assert b"prefers-color-scheme: dark" in drawing
    assert drawing == chart([report(stored()), report(stored(task="other <task>"))])


def test_a_chart_is_a_picture_if_so_asked():
    drawing = chart([report(stored()), report(stored(task="other"))], "png")
    width, height = Image.open(BytesIO(drawing)).size
    assert height > width / 2
    assert chart([report(stored())], "pdf").startswith(b"%PDF")


def test_a_chart_of_another_kind_is_refused():
    for kind in ("", "gif", "txt"):
        with pytest.raises(FastAVError, match="cannot be written") as refused:
            chart([report(stored())], kind)
        assert ".png" in refused.value.hint


COORDINATE = st.integers(0, 20).map(float)


@given(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=1, max_size=12, unique=True))
def test_the_front_is_what_no_other_point_beats(places):
    points = [Point(name=str(i), flops=x, score=y, low=y, high=y) for i, (x, y) in enumerate(places)]
    expected = [p for p in points if not any(q is not p and q.flops <= p.flops and q.score >= p.score for q in points)]
    assert front(points) == sorted(expected, key=lambda point: point.flops)


ROOM = Box(60, 70, 870, 400)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(ROOM.left, ROOM.right), st.floats(ROOM.top, ROOM.bottom), st.integers(20, 200)),
        min_size=1,
        max_size=10,
    )
)
def test_labels_cover_neither_each_other_nor_points(places):
    points = [(x, y) for x, y, _ in places]
    taken = [Box(x - 5, y - 20, x + 5, y + 20) for x, y in points]
    boxes = place_labels(points, [(float(width), 18.0) for _, _, width in places], ROOM, taken)
    for number, box in enumerate(boxes):
        assert box.outside(ROOM) < 1e-6
        assert not any(box.overlap(other) > 1e-6 for other in (*boxes[:number], *taken))


def test_labels_without_room_are_placed_somewhere():
    boxes = place_labels([(5.0, 5.0)] * 3, [(50.0, 20.0)] * 3, Box(0, 0, 10, 10), [])
    assert len(boxes) == 3


def samples(families: str) -> list[Sample]:
    from fastav.media import Clip

    clip = Clip(name="", video=None, audio=None)
    return [Sample(id=str(i), clip=clip, question="?", answer="", family=f) for i, f in enumerate(families)]


@given(st.text("abc", min_size=1, max_size=20), st.integers(1, 20))
def test_a_limit_takes_the_families_by_turns(families, limit):
    every = choose_samples(samples(families))
    assert sorted(sample.id for sample in every) == sorted(str(i) for i in range(len(families)))
    assert [sample.id for sample in choose_samples(samples(families), limit=limit)] == [
        sample.id for sample in every[:limit]
    ]
    counts = [sum(sample.family == family for sample in every[:limit]) for family in set(families)]
    full = [families.count(family) for family in set(families)]
    assert all(a >= b - 1 or a == n for a, n in zip(counts, full, strict=True) for b in counts)


def test_families_are_chosen_by_name():
    assert {sample.family for sample in choose_samples(samples("aabbc"), ["a", "c"])} == {"a", "c"}
    with pytest.raises(UnknownName, match="no family of samples is called 'd'"):
        choose_samples(samples("ab"), ["d"])
