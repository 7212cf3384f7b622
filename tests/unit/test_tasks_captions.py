"""CIDEr-D against its formula, written out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastav.tasks._captions import CiderD, words

CORPUS = ["a dog barks at a cat", "a cat sits", "rain falls on a roof"]
SAID = ["a", "dog", "barks", "at", "cat", "sits", "rain", "falls", "on", "roof", "the"]
captions = st.lists(st.sampled_from(SAID), max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's T-shirt, isn't it?", ["a", "man", "'s", "t-shirt", "is", "n't", "it"]),
        ("They\u2019re here -- now.", ["they", "'re", "here", "now"]),
        ("", []),
        ("... !", []),
        ("2 dogs bark", ["2", "dogs", "bark"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_a_reference_is_as_good_as_can_be():
    assert CiderD(CORPUS).score("A dog barks at a cat!", CORPUS[0]) == pytest.approx(10)


def test_captions_with_nothing_in_common_score_0():
    assert CiderD(CORPUS).score("rain falls", "a cat sits") == 0
    assert CiderD(CORPUS).score("", CORPUS[0]) == 0


def test_it_is_the_formula():
    """ "a a cat" against "a cat sits": "a" is in all references and weighs nothing, the count of "a" is clipped."""
    two, one = math.log(3 / 2), math.log(3)
    unigrams = two * two / (two * math.hypot(two, one))  # cat: 2 of 3 references; sits: 1
    # caption: "a a" in none of the references weighs log 3, "a cat" is in 2; reference: "a cat", "cat sits"
    bigrams = two * two / (math.hypot(one, two) * math.hypot(two, one))
    assert CiderD(CORPUS).score("a a cat", "a cat sits") == pytest.approx(10 * (unigrams + bigrams) / 4)


def test_another_length_costs():
    longer = CiderD(CORPUS).score("a cat sits", "a cat sits") - CiderD(CORPUS).score("a cat sits a a a", "a cat sits")
    assert longer > 10 * (1 - math.exp(-9 / 72))


@given(captions, captions)
def test_it_stays_in_its_range(caption, reference):
    assert 0 <= CiderD(CORPUS).score(caption, reference) <= 10 + 1e-9
