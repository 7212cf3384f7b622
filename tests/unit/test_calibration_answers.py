"""The answers of a calibration: their agreement and times, on disk and in the report."""

import json
import random

import pytest

from fastav.agreement import words
from fastav.calibrate import AnswerPair, Comparison, Store
from fastav.calibrate.answers import FEW, evenly_spread, phase_seconds
from fastav.errors import CalibrationError
from fastav.report.changes import changed_words
from fastav.statistics import interval

MACHINE = {"cpu": "A processor", "cores": 2}


def answer(text: str = "a bell", *, ids=(5, 6), finish="stop", prefill=2.0, decode=1.0, ratio=1.0) -> dict:
    return {
        "text": text,
        "token_ids": list(ids),
        "finish": finish,
        "seconds": {"media": 9.0, "encode": 9.0, "prefill": prefill, "decode": decode},
        "flops": {"ratio": ratio},
        "kv_bytes": {"ratio": ratio / 2},
    }


def pair(unpruned: dict, pruned: dict, question: str = "what?", machine=MACHINE) -> AnswerPair:
    return AnswerPair(clip="a.mp4", question=question, machine=machine, unpruned=unpruned, pruned=pruned)


def comparison(*pairs: AnswerPair, traced: int | None = None) -> Comparison:
    return Comparison(pairs=pairs, traced=len(pairs) if traced is None else traced, max_new_tokens=64)


THREE = (
    pair(answer(), answer(ratio=0.5, prefill=1.0)),
    pair(answer("a red drum", ids=(5, 1, 2)), answer("a big drum", ids=(5, 3, 2), ratio=0.7, prefill=1.2), "second?"),
    pair(answer("yes", ids=(8,)), answer("no", ids=(9,), ratio=0.6, prefill=3.0, decode=3.0), "third?"),
)


def test_agreement_has_the_intervals_of_wilson():
    found = comparison(*THREE).summary()
    assert found["n"] == 3
    assert found["exact"] == {"mean": pytest.approx(1 / 3), "interval": list(interval([1, 0, 0]))}
    assert found["first_token"] == {"mean": pytest.approx(2 / 3), "interval": list(interval([1, 1, 0]))}
    assert found["rouge_l"]["mean"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["flops_ratio"] == pytest.approx(0.6)
    assert found["kv_ratio"] == pytest.approx(0.3)


def test_the_answers_that_differ_most_come_first():
    found = comparison(*THREE).summary()["differences"]
    assert [(one["question"], one["unpruned"], one["pruned"]) for one in found] == [
        ("third?", "yes", "no"),
        ("second?", "a red drum", "a big drum"),
    ]


def test_times_are_medians_and_their_ratio_is_that_of_pairs():
    found = comparison(*THREE).summary()
    assert found["seconds"]["unpruned"]["prefill"] == 2.0
    assert found["seconds"]["pruned"]["prefill"] == 1.2
    assert found["time_ratio"]["prefill"] == {
        "n": 3,
        "median": pytest.approx(0.6),
        "quartiles": [pytest.approx(0.55), pytest.approx(1.05)],
    }
    assert found["time_ratio"]["decode"]["median"] == 1.0
    assert found["noisy"]
    assert not comparison(*THREE * FEW).summary()["noisy"]


def test_a_token_of_decoding_takes_its_share_and_the_end_marker_is_one():
    assert phase_seconds(answer(ids=(5, 6), decode=3.0))["decode_per_token"] == 1.5
    assert phase_seconds(answer(ids=(5, 6), decode=3.0, finish="length"))["decode_per_token"] == 3.0
    assert phase_seconds(answer(ids=(5,), finish="length", decode=0.0)) == {"prefill": 2.0}
    assert phase_seconds(answer(ids=())) == {"prefill": 2.0}
    one = pair(answer(ids=(5,), finish="length"), answer())
    assert comparison(one).summary()["time_ratio"]["decode"] is None


def test_every_machine_is_named_once():
    other = {"cpu": "Another", "cores": 4}
    found = comparison(THREE[0], pair(answer(), answer(), machine=other), THREE[1]).machines()
    assert found == [MACHINE, other]


def test_no_answers_at_all_have_no_measures():
    found = comparison(traced=4).summary()
    assert (found["n"], found["prompts"], found["exact"], found["flops_ratio"]) == (0, 4, None, None)
    assert set(found["time_ratio"].values()) == {None}


def test_prompts_are_evenly_spread():
    assert evenly_spread(range(10), 4) == [0, 3, 6, 9]
    assert evenly_spread(range(3), 64) == [0, 1, 2]
    assert evenly_spread(range(3), 0) == []
    assert evenly_spread([], 64) == []
    for number in range(1, 100):
        found = evenly_spread(range(100), number)
        assert len(set(found)) == number


def test_a_store_gives_back_the_answers_it_was_given_and_refuses_broken_ones(tmp_path):
    store = Store(tmp_path / "cal")
    store.begin({"model": "tiny"})
    assert not store.has_pair("one")
    store.save_pair("one", THREE[1])
    assert store.has_pair("one")
    assert store.load_pair("one") == THREE[1]
    assert [path.name for path in (tmp_path / "cal" / "answers").iterdir()] == ["one.json"]
    path = tmp_path / "cal" / "answers" / "one.json"
    whole = json.loads(path.read_text())
    without_seconds = {key: value for key, value in whole["pruned"].items() if key != "seconds"}
    for broken in ("{", "[]", "{}", json.dumps(whole | {"pruned": without_seconds}), json.dumps(whole | {"more": 1})):
        path.write_text(broken)
        with pytest.raises(CalibrationError, match=r"cannot read .*one\.json") as caught:
            store.load_pair("one")
        assert caught.value.hint == "delete it and calibrate again"


# --- words that differ


def marked(before: str, after: str) -> tuple[str, str]:
    first, second = (
        "".join(f"[{text}]" if is_marked else text for text, is_marked in one) for one in changed_words(before, after)
    )
    return first, second


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("a red drum", "a big drum", ("a [red] drum", "a [big] drum")),
        ("two low beeps", "one mid beep", ("[two low beeps]", "[one mid beep]")),
        ("a drum", "a red, big drum", ("a drum", "a [red, big] drum")),
        ("Yes.", "yes", ("[Yes.]", "[yes]")),
        ("one\ntwo", "one two", ("one\ntwo", "one two")),
        ("", "a drum", ("", "[a drum]")),
        ("", "", ("", "")),
        ("一个红球", "一个蓝球", ("一个[红]球", "一个[蓝]球")),
        ("snake_case", "snake_cast", ("[snake_case]", "[snake_cast]")),
    ],
)
def test_words_of_one_answer_alone_are_marked(before, after, found):
    assert marked(before, after) == found


def test_segments_are_the_texts_and_what_is_unmarked_is_in_both():
    chance = random.Random(0)
    for _ in range(200):
        before, after = ("".join(chance.choices("ab, \n", k=chance.randrange(12))) for _ in range(2))
        first, second = changed_words(before, after)
        assert ("".join(text for text, _ in first), "".join(text for text, _ in second)) == (before, after)
        left = [words("".join(" " if is_marked else text for text, is_marked in one)) for one in (first, second)]
        assert left[0] == left[1]
