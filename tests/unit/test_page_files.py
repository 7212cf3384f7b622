"""The files of the page and of the report of answers, as text."""

import re
from pathlib import Path

import pytest

import fastav

PACKAGE = Path(fastav.__file__).parent
PAGE = PACKAGE / "serve/page"
REPORT = [PACKAGE / "report" / name for name in ("viewer.js", "viewer.css", "answer.html")]
FILES = sorted([*PAGE.iterdir(), *REPORT])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_refers_to_another_host(file):
    addresses = re.findall(r"(?:https?|wss?):?//[^\s\"'`]+|(?:src|href|url)\s*[=(]\s*[\"']?//", file.read_text())
    assert addresses == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_makes_html_or_code_from_text(file):
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", file.read_text())
        == []
    )


def test_every_file_that_the_page_loads_exists():
    html = (PAGE / "index.html").read_text()
    loaded = re.findall(r"/static/([\w.]+)", html)
    modules = [name for file in PAGE.glob("*.js") for name in re.findall(r'from "\./([\w.]+)"', file.read_text())]
    served = {file.name for file in FILES}
    assert loaded
    assert modules
    assert {*loaded, *modules} <= served


def test_the_page_has_no_scripts_inside():
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=", (PAGE / "index.html").read_text())


def test_the_reports_template_has_each_of_its_markers_once():
    template = (PACKAGE / "report/answer.html").read_text()
    for marker in ("/*{{css}}*/", "/*{{js}}*/", "{{data}}"):
        assert template.count(marker) == 1
    assert template.count("{{") == 3


def test_what_goes_into_the_report_cannot_end_its_script():
    script, style = ((PACKAGE / "report" / name).read_text() for name in ("viewer.js", "viewer.css"))
    assert "</script" not in script
    assert "<!--" not in script
    assert "{{" not in script
    assert "</style" not in style
    assert "{{" not in style
