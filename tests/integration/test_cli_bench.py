"""`fastav bench` and `python -m fastav.bench`: one command, from its arguments to its files and exit codes."""

import json

import pytest
import torch

from fastav import cli
from fastav.bench import limits
from fastav.bench.__main__ import main as module

QUICK = ["--device", "cpu", "--rounds", "1", "--tokens", "96", "--plan", "fastav"]


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    """How fast the machine is takes a while to find out."""
    monkeypatch.setattr(limits, "rates", lambda *_: limits.Rates(flops=1e11, bytes=1e10))


def test_tables_are_printed_and_the_report_is_written(tmp_path, capsys):
    assert cli.main(["bench", "tiny", *QUICK, "--batch", "1,2", "--new-tokens", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "tiny, 44 text + " in printed
    assert printed.count("= 96 tokens, batch ") == 2
    assert max(map(len, printed.splitlines())) <= 100
    report = json.loads((tmp_path / "speed-tiny-96-cpu.json").read_text())
    assert report["command"].startswith(
        "python -m fastav.bench tiny --plan fastav --batch 1,2 --tokens 96 --new-tokens 2"
    )
    assert [part["batch"] for part in report["parts"]] == [1, 2]


def test_lists_may_be_given_again(capsys):
    arguments = ["tiny", "--device", "cpu", "--rounds", "1", "--tokens", "96", "--tokens", "128", "--json"]
    assert cli.main(["bench", *arguments, "--plan", "fastav", "--plan", "fastv@0.25"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [part["tokens"] for part in report["parts"]] == [96, 128]
    assert [row["contender"] for row in report["parts"][0]["rows"]][2:] == ["fastav", "fastv@0.25"]
    assert report["new_tokens"] == 0
    assert report["parts"][0]["rows"][0]["end_to_end"] is None


def test_the_module_is_the_same_command(capsys):
    assert module(["tiny", *QUICK, "--commit", "abc", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["schema_version"]) == ("tiny", 1)


def test_a_picture_is_drawn_on_request(tmp_path):
    assert cli.main(["bench", "tiny", *QUICK, "--tokens", "128", "--plot", str(tmp_path / "new" / "p.png")]) == 0
    assert (tmp_path / "new" / "p.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tests"], "no model at 'tests'"),
        (["tiny", "--plan", "fastaf"], "fastaf"),
        (["tiny", "--batch", "0"], "--batch must be a whole number above 0"),
        (["tiny", "--batch", "two"], "--batch must be a whole number above 0"),
        (["tiny", "--tokens", "-5"], "--tokens must be a whole number above 0"),
        (["tiny", "--seconds", "nan"], "--seconds must be a number above 0"),
        (["tiny", "--rounds", "0"], "--rounds"),
        (["tiny", "--new-tokens", "-1"], "--new-tokens"),
        (["tiny", "--attention", "flash_attention_2"], "flash_attention_2 cannot be measured here"),
        (["tiny", "--out", "/dev/null/results"], "cannot write into"),
    ],
)
def test_mistakes_end_in_a_line_and_exit_code_2(arguments, says, capsys):
    for run in (
        lambda: cli.main(["bench", *arguments, "--device", "cpu"]),
        lambda: module([*arguments, "--device", "cpu"]),
    ):
        assert run() == 2
        assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_one_line_and_a_hint(capsys):
    assert module(["tiny", "--device", "cuda"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")


def test_a_missing_package_is_named_in_one_line(monkeypatch, capsys):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")

    monkeypatch.setattr("fastav.bench.session.Session.of", missing)
    assert module(["tiny"]) == 2
    assert capsys.readouterr().err == "error: fastav bench needs the package 'safetensors', which is not installed\n"
