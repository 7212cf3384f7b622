"""`fastav report`, on what a calibration of the embedded model left."""

from importlib import resources
from pathlib import Path

import pytest

from fastav.calibrate import Calibration, Criterion, Store
from fastav.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "cal"
    clip = str(resources.files("fastav") / "assets" / "clips" / "knock.mp4")
    calibration = Calibration.of("tiny", [clip], ["what colour is the moving shape?"], folder=folder, device="cpu")
    assert len(list(calibration.run())) == 1
    calibration.finish(Criterion(budget=0.6), max_new_tokens=2)
    return folder


def test_it_writes_the_page_into_the_folder_and_says_where(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr() == (f"wrote {folder / 'report.html'}\n", "")
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "what colour is the moving shape?" in html
    assert "data:image/jpeg" in html
    assert html.rstrip().endswith("</html>")


def test_bad_folders_end_with_one_error_and_nothing_written(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    for arguments, said in (
        (["report", str(tmp_path / "nowhere")], "has no finished calibration"),
        (["report", str(folder / "calibration.json")], "cannot read"),
        (["report", str(tmp_path), "--out", str(out)], "has no finished calibration"),
    ):
        assert main(arguments) == 2
        printed, error = capsys.readouterr()
        assert printed == ""
        assert error.startswith("error: ")
        assert said in error
        assert len(error.splitlines()) <= 2
    assert not out.exists()


def test_a_prompt_that_cannot_be_read_leaves_the_page_that_was_there(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    out.write_text("before")
    prompt = folder / "prompts" / f"{Store(folder).result()['shown']}.npz"
    whole = prompt.read_bytes()
    prompt.write_bytes(whole[:99])
    assert main(["report", str(folder), "--out", str(out)]) == 2
    prompt.write_bytes(whole)
    assert prompt.name in capsys.readouterr().err
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]
