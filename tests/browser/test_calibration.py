"""The answers in the report of a calibration, on wide and on narrow screens."""

from importlib import resources

import pytest

from fastav.calibrate import Calibration, Criterion
from fastav.report import page as report_page

pytestmark = pytest.mark.browser
QUESTIONS = ["how many beeps do you hear?", "what colour is the moving shape?"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    clip = str(resources.files("fastav") / "assets" / "clips" / "knock.mp4")
    calibration = Calibration.of("tiny", [clip], QUESTIONS, folder=folder / "cal", device="cpu")
    assert len(list(calibration.run())) == 2
    calibration.finish(Criterion(budget=0.55))
    path = folder / "report.html"
    path.write_text(report_page(folder / "cal"), encoding="utf-8")
    return path.as_uri()


def test_answers_that_differ_are_in_sight_and_equal_ones_folded(open_tab, report):
    tab = open_tab()
    tab.goto(report)
    answers = tab.locator("section[aria-labelledby=answers]")
    assert answers.locator("td mark").all_inner_texts() == ["two", "one"]
    equal = answers.locator("details td", has_text=QUESTIONS[1])
    assert not equal.is_visible()
    answers.locator("summary").click()
    assert equal.is_visible()


def test_a_narrow_screen_shows_every_column(open_tab, report):
    tab = open_tab(viewport={"width": 360, "height": 800})
    tab.goto(report)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    for cell in tab.locator("section:not(details *) > table.stacked td, .scroll > table.stacked td").all():
        box = cell.bounding_box()
        assert box is None or box["x"] + box["width"] <= 360
    ratio = tab.locator("td[data-label=Ratio]").first
    assert ratio.evaluate("cell => getComputedStyle(cell, '::before').content") == '"Ratio"'
