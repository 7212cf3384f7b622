"""From rows of a verification to a report, thresholds, a choice, and a page."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fastav import statistics
from fastav.errors import FastAVError, PlanError
from fastav.presets import NONE
from fastav.report import losses_page
from fastav.verify import Compared, Measured, Row, Thresholds, Verification, open_rows, read, report

HEAD = {
    "model": "m",
    "device": "cpu",
    "dtype": "float32",
    "plans": {"half": {"fingerprint": "1", "steps": []}, "tenth": {"fingerprint": "2", "steps": []}},
    "questions": "abc",
    "n_questions": 3,
    "max_new_tokens": 8,
    "machine": {"cpu": "a cpu"},
    "versions": {"fastav": "1"},
    "commit": "abc1234",
}


def measured(text: str, ratio: float = 1.0, **changes) -> Measured:
    plain = Measured(
        text=text,
        finish="stop",
        new_tokens=2,
        prompt_tokens={"video": 10, "text": 3},
        kept={"video": ratio, "media": ratio},
        flops={"full": 100, "pruned": int(100 * ratio)},
        kv_bytes={"full": 1000, "pruned": int(1000 * ratio)},
        seconds={"media": 0.5, "prefill": ratio, "decode": 0.5},
        peak_bytes=None,
    )
    return replace(plain, **changes)


def compared(text: str, kl: float, ratio: float, unpruned: str = "a red dog") -> Compared:
    return Compared(
        answer=measured(text, ratio),
        exact=text == unpruned,
        first_token=text.split()[:1] == unpruned.split()[:1],
        rouge_l=1.0 if text == unpruned else 0.5,
        kl={"mean": kl, "max": 3 * kl},
    )


def row(id_: str | int, half: Compared | None = None, tenth: Compared | None = None, **changes) -> Row:
    plans = {
        "half": half or compared("a red dog", 0.01, 0.5),
        "tenth": tenth or compared("a <b>cat</b>", 0.4, 0.1),
    }
    fields = {
        "clip": "clips/a.mp4",
        "question": "what?",
        "use": "auto",
        "unpruned": measured("a red dog"),
        "plans": plans,
    }
    return Row(id=id_, **(fields | changes))


def stored(path: Path, *rows: Row):
    with open_rows(path, HEAD) as file:
        for one in rows:
            file.append(one)
        return file.results


@pytest.fixture
def results(tmp_path):
    return stored(tmp_path / "rows.jsonl", row(1), row("1"), row(2, half=compared("a blue dog", 0.05, 0.5)))


def test_rows_come_back_as_they_were(results, tmp_path):
    assert read(tmp_path / "rows.jsonl") == results
    assert [one.key for one in results.rows] == [1, "1", 2]


def test_a_report_by_plan(results):
    found = report(results)
    half, tenth = found["plans"]["half"], found["plans"]["tenth"]
    assert (half["n"], half["errors"]) == (3, 0)
    assert half["exact"] == {"mean": pytest.approx(2 / 3), "interval": list(statistics.interval([1, 1, 0]))}
    assert tenth["exact"]["mean"] == 0
    assert tenth["first_token"]["mean"] == 1
    assert half["rouge_l"]["mean"] == pytest.approx(5 / 6)
    assert half["kl"]["mean"] == pytest.approx(0.07 / 3)
    assert half["kl"]["max"] == pytest.approx(0.15)
    assert half["kl"]["interval"] == list(statistics.bootstrap_interval([0.01, 0.01, 0.05]))
    assert (half["flops_ratio"], half["kv_ratio"], half["kept"]["media"]) == (0.5, 0.5, 0.5)
    assert half["seconds"] == {"prefill": 0.5, "whole": 1.5}
    assert half["time_ratio"] == {"prefill": 0.5, "whole": 0.75}
    assert found["unpruned"]["seconds"] == {"prefill": 1.0, "whole": 2.0}


def test_answers_that_differ_come_with_the_largest_divergence_first(results):
    found = report(results)["differences"]
    assert [(one["plan"], one["id"]) for one in found] == [("tenth", 1), ("tenth", "1"), ("tenth", 2), ("half", 2)]
    assert (found[3]["unpruned"], found[3]["pruned"]) == ("a red dog", "a blue dog")


def test_what_failed_is_told_and_in_no_mean(tmp_path):
    failed = Compared(error="no memory")
    results = stored(
        tmp_path / "rows.jsonl", row(1), row(2, tenth=failed), row(3, error="no such clip", unpruned=None, plans={})
    )
    found = report(results)
    assert (found["questions"], found["answered"]) == (3, 2)
    assert (found["plans"]["half"]["n"], found["plans"]["tenth"]["n"], found["plans"]["tenth"]["errors"]) == (2, 1, 1)
    assert [(one["id"], one["plan"], one["error"]) for one in found["failures"]] == [
        (2, "tenth", "no memory"),
        (3, "unpruned", "no such clip"),
    ]
    assert Thresholds(max_kl=9).unmet(found["plans"]["tenth"]) == ["1 question failed"]


def test_a_report_of_failures_only(tmp_path):
    results = stored(tmp_path / "rows.jsonl", row(1, error="no", unpruned=None, plans={}))
    found = report(results)
    assert found["plans"]["half"]["kl"] is None
    assert Thresholds(max_kl=9).unmet(found["plans"]["half"]) == ["no question has an answer"]
    found |= {"thresholds": {"max_kl": None, "min_agreement": None}, "skipped": {}, "choice": None}
    assert "half: no question has an answer." in losses_page(results, found)


# --- thresholds


def test_thresholds_judge_by_the_estimate_and_with_caution_by_the_interval(results):
    half = report(results)["plans"]["half"]
    assert Thresholds(max_kl=0.03).unmet(half) == []
    assert Thresholds(max_kl=0.03).unmet(half, cautious=True) == ["the KL divergence may be 0.05, above 0.03"]
    assert Thresholds(min_agreement=0.6).unmet(half) == []
    (reason,) = Thresholds(min_agreement=0.6).unmet(half, cautious=True)
    assert reason == "the share of equal answers may be 20.8 %, below 60 %"
    assert len(Thresholds(max_kl=0.001, min_agreement=1).unmet(half)) == 2


def test_one_question_has_no_interval_to_choose_by(tmp_path):
    half = report(stored(tmp_path / "rows.jsonl", row(1)))["plans"]["half"]
    assert Thresholds(max_kl=9).unmet(half) == []
    assert Thresholds(max_kl=9).unmet(half, cautious=True) == ["the KL divergence of one question has no interval"]


def test_the_cheapest_plan_that_meets_the_thresholds_is_chosen(results):
    found = report(results)
    assert Thresholds(max_kl=1).choose(found)["plan"] == "tenth"
    choice = Thresholds(max_kl=0.1).choose(found)
    assert (choice["plan"], choice["met"]) == ("half", ["half"])
    assert choice["rejected"] == {"tenth": "the KL divergence may be 0.4, above 0.1"}
    assert Thresholds(max_kl=1, min_agreement=0).choose(found)["rejected"] == {"half": "it costs no less than tenth"}
    assert Thresholds(max_kl=0).choose(found)["plan"] is None
    with pytest.raises(FastAVError, match="no threshold to choose by"):
        Thresholds().choose(found)


@pytest.mark.parametrize(
    "bad", [{"max_kl": -1}, {"max_kl": float("nan")}, {"min_agreement": 90}, {"min_agreement": -0.1}]
)
def test_thresholds_out_of_range(bad):
    (name,) = bad
    with pytest.raises(FastAVError, match=f"{name} must be"):
        Thresholds(**bad)


# --- files


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"model": "other"}, "of the model 'm', not 'other'"),
        ({"dtype": "bfloat16"}, "of the dtype"),
        ({"device": "cuda"}, "of the device"),
        ({"questions": "def"}, "of the questions 'abc'"),
        ({"max_new_tokens": 9}, "of the max_new_tokens 8, not 9"),
        ({"plans": {"half": HEAD["plans"]["half"]}}, "differ in tenth"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(results, tmp_path, change, found):
    path = tmp_path / "rows.jsonl"
    before = path.read_bytes()
    with pytest.raises(FastAVError, match=found), open_rows(path, HEAD | change):
        pytest.fail("opened")
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", [{"answer": None}, {"kl": {}}, {"answer": asdict(measured("x")) | {"flops": {}}}])
def test_a_broken_row_is_refused_by_its_number(results, tmp_path, change):
    import json

    path = tmp_path / "rows.jsonl"
    entry = asdict(row(9))
    entry["plans"]["half"] |= change
    path.write_bytes(path.read_bytes() + json.dumps(entry).encode() + b"\n")
    with pytest.raises(FastAVError, match=r"line 5 of .* cannot be read"):
        read(path)


def test_an_evaluation_s_file_is_no_verification(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"fastav_eval": 1}\n')
    with pytest.raises(FastAVError, match="is not a file of rows"):
        read(path)


def test_moving_the_folder_changes_no_questions(tmp_path):
    prints = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "questions.jsonl"
        file.write_text('{"clip": "a.mp4", "question": "what?"}\n')
        prints.append(Verification.of("tiny", file, {"none": NONE}, device="cpu").fingerprint)
        file.write_text('{"clip": "a.mp4", "question": "who?"}\n')
        prints.append(Verification.of("tiny", file, {"none": NONE}, device="cpu").fingerprint)
    assert prints[:2] == prints[2:]
    assert prints[0] != prints[1]
    with pytest.raises(PlanError, match="no plan to verify"):
        Verification.of("tiny", file, {})


# --- the page


def test_the_page_says_all_of_it_safely(results):
    found = report(results)
    limits = Thresholds(max_kl=0.1)
    found["plans"] = {name: {**plan, "unmet": limits.unmet(plan)} for name, plan in found["plans"].items()}
    found |= {"thresholds": {"max_kl": 0.1, "min_agreement": None}, "skipped": {"odd": "a reason"}, "choice": None}
    page = losses_page(results, found)
    assert "a &lt;b&gt;cat&lt;/b&gt;" in page
    assert "<b>cat" not in page
    assert "With half, 2 of 3" in page
    assert "tenth does not meet the thresholds: the KL divergence is 0.4, above 0.1." in page
    assert "a reason" in page
    assert page.index("a blue dog") < page.index("Answers that stay the same")
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]+"|url\((?!#)', page)  # nothing is loaded
    assert "<script" not in page
    chosen = losses_page(results, found | {"choice": limits.choose(found)})
    assert "Chosen: half." in chosen
    assert "With tenth" not in chosen
