"""Reading the letter of an answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastav.tasks._choices import LETTERS, format_question, parse, strip_letters

INSTRUMENTS = ("A violin", "a cello", "Two guitars.", "3")

words = st.text("abcdefgh xyz0123456789", min_size=2, max_size=20).map(str.strip).filter(lambda text: len(text) > 1)
options = st.lists(words, min_size=2, max_size=6, unique=True)
forms = st.sampled_from(
    [
        "{0}",
        "{0}.",
        "({0})",
        "{0})",
        " {0}\n",
        "**{0}**",
        "Answer: {0}",
        "answer: ({0}).",
        "The answer is {0}.",
        "The correct option is: {0}",
        "The best answer is: {0}",
        "{0}. {1}",
        "({0}) {1}.",
        "Answer: {0}: {1}",
        "{1}",
        "{1}.",
    ]
)


@given(options, forms, st.data())
def test_every_way_of_naming_an_option_is_read(options, form, data):
    index = data.draw(st.integers(0, len(options) - 1))
    assert parse(form.format(LETTERS[index], options[index]), options) == LETTERS[index]


@given(st.text(), options)
def test_a_letter_that_is_read_stands_in_the_answer_or_its_option_does(text, options):
    letter = parse(text, options)
    if letter is not None:
        assert letter in LETTERS[: len(options)]
        assert letter.lower() in text.lower() or options[LETTERS.index(letter)] in text.lower()


@given(st.text(), options, st.sampled_from([" ", "\n", ".", "  \n"]))
def test_ends_do_not_matter(text, options, end):
    assert parse(text + end, options) == parse(text, options)


@given(options)
def test_letters_come_and_go(options):
    lines = format_question("What?", options).splitlines()[1:-1]
    assert strip_letters(lines) == tuple(options)
    assert strip_letters(options) == tuple(options)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "E",
        "(E)",
        "A or B",
        "A, B",
        "Both A and B",
        "A man plays",
        "A guitar",
        "A. a cello",
        "I think it is B",
        "The video shows a violin",
        "Answer:",
        "AB",
        "Answers",
        "cello",
        "1",
        "ä",
    ],
)
def test_anything_else_names_no_option(text):
    assert parse(text, INSTRUMENTS) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [("a violin", "A"), ("A CELLO.", "B"), ("two guitars", "C"), ("3", "D"), ("a", "A"), ("d. 3", "D"), ("'C'", "C")],
)
def test_texts_of_options_are_read_word_for_word(text, letter):
    assert parse(text, INSTRUMENTS) == letter


def test_a_letter_counts_before_an_option_that_is_one():
    assert parse("B", ("C", "D", "B")) == "B"


def test_a_text_that_two_options_share_names_neither():
    assert parse("dog", ("dog", "Dog", "cat")) is None
    assert parse("B", ("dog", "Dog", "cat")) == "B"


@pytest.mark.parametrize("options", [("A. one", "two"), ("A. one", "C. two"), ("one", "B. two")])
def test_letters_that_are_not_all_there_are_part_of_the_option(options):
    assert strip_letters(options) == options


def test_letters_of_every_style_are_taken_off():
    assert strip_letters(["A.one", "(B) two", "C: three", "D)  4"]) == ("one", "two", "three", "4")


def test_a_question_is_shown_with_one_option_a_line():
    shown = format_question("How many?", ["one", "two"], "Listen.", "Say it.")
    assert shown == "Listen.\nHow many?\nA. one\nB. two\nSay it."
