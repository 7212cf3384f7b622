"""The command line on the reference checkpoint, whose weights are random, and on the released configuration."""

import io
import json
import os
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from fastav.cli import _render, main
from support.command import failure, stdout

REFERENCE = Path(__file__).parents[1] / "reference" / "videollama2"
CLIP, SOUND, MODEL = str(REFERENCE / "clip.mp4"), str(REFERENCE / "sound.wav"), str(REFERENCE)
ASK = ("run", CLIP, "What do you hear?", "--model", MODEL, "--max-new-tokens", "3", "--device", "cpu")
ANSWER = {
    *("text", "token_ids", "finish", "plan", "prompt_tokens", "tokens_per_layer"),
    *("mean_retention", "flops", "kv_bytes", "seconds", "peak_bytes", "dropped_ends"),
}
HEAD = {"schema_version", "model", "clip", "question", "device", "dtype", "versions"}


def check_answer(answer: dict) -> None:
    assert answer.keys() >= ANSWER
    assert len(answer["token_ids"]) == 3
    assert set(answer["prompt_tokens"]) == {"video", "audio", "text"}
    assert len(answer["tokens_per_layer"]) == 4
    assert answer["tokens_per_layer"][0] == answer["prompt_tokens"]
    assert set(answer["flops"]) == {"full", "pruned", "ratio"}
    assert set(answer["kv_bytes"]) >= {"full", "pruned"}
    assert set(answer["seconds"]) == {"media", "encode", "prefill", "decode"}


def test_json_has_every_field(capsys):
    report = json.loads(stdout(capsys, *ASK, "--json"))
    assert report.keys() == HEAD | ANSWER
    check_answer(report)
    assert report["plan"] == "fastav"
    assert report["flops"]["ratio"] < 0.7
    assert set(report["versions"]) == {"fastav", "torch", "transformers"}


@pytest.fixture(scope="module")
def text() -> str:
    """What the unpruned model answers."""
    with redirect_stdout(io.StringIO()) as out:
        assert main([*ASK, "--plan", "none", "--json"]) == 0
    return json.loads(out.getvalue())["text"]


def test_the_answer_goes_to_stdout_and_its_cost_to_stderr(text, capsys):
    assert main([*ASK, "--plan", "none"]) == 0
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert "1,496 audio" in err
    assert "(100.0 %)" in err


def test_a_terminal_gets_the_answer_as_it_comes(text, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert stdout(capsys, *ASK, "--plan", "none").strip() == text


def test_compare_runs_both_plans_and_shows_them_side_by_side(capsys, monkeypatch):
    report = json.loads(stdout(capsys, *ASK, "--compare", "--repeat", "1", "--json"))
    assert report.keys() == HEAD | {"repeat", "plans"}
    assert list(report["plans"]) == ["none", "fastav"]
    for answer in report["plans"].values():
        check_answer(answer)
    assert report["plans"]["none"]["flops"]["ratio"] == 1
    assert report["plans"]["fastav"]["flops"]["ratio"] < 0.7

    monkeypatch.setenv("COLUMNS", "80")
    _render.comparison(report)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    found = {line.split("  ")[0] for line in lines}
    assert found >= {"answer", "prefill FLOPs", "KV cache", "media", "encode", "prefill", "decode", "peak memory"}
    assert any(line.startswith("fastav  0-1 ") for line in lines)


def test_compare_takes_several_plans(capsys):
    plans = ("--plan", "fastav,fastav-plus", "--compare", "--repeat", "1")
    out = stdout(capsys, *ASK[:-2], *plans) if "--plan" in ASK else stdout(capsys, *ASK, *plans)
    (head,) = [line for line in out.splitlines() if line.split() == ["none", "fastav", "fastav-plus"]]
    (against,) = [line for line in out.splitlines() if line.startswith("against none")]
    assert len(against.split()) == 4
    (flops,) = [line.split() for line in out.splitlines() if line.startswith("prefill FLOPs")]
    assert flops.count("%") == 2
    assert head


def test_sound_alone(capsys):
    arguments = ("run", SOUND, "What do you hear?", "--model", MODEL, "--max-new-tokens", "1", "--json")
    assert "video" not in json.loads(stdout(capsys, *arguments))["prompt_tokens"]


def test_a_plan_file_runs(capsys, tmp_path):
    path = str(tmp_path / "plan.json")
    stdout(capsys, "plan", "write", "fastav", "--model", MODEL, "--out", path, "--drop", "0", "--keep-audio", "7")
    report = json.loads(stdout(capsys, *ASK, "--plan", path, "--json"))
    assert report["tokens_per_layer"][-1]["audio"] == 7


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (("--plan", "fastaw"), "did you mean 'fastav'"),
        (("--plan", "no.json"), "no.json"),
        (("--plan", "none", "--compare"), "nothing to compare"),
        (("--plan", "fastav,none", "--compare"), "nothing to compare"),
        (("--plan", "fastav,fastav", "--compare"), "the same name"),
        (("--plan", "fastav,nope", "--compare"), "no plan"),
        (("--plan", "fastav,fastav-plus"), "no plan"),
        (("--model", "no/such/folder"), "no/such/folder"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_bad_options(changes, found, capsys):
    assert found in failure(capsys, *ASK, *changes)


@pytest.mark.parametrize("content", ["missing", "empty", "text", "truncated"])
def test_bad_clips(content, capsys, tmp_path):
    path = tmp_path / "bad.mp4"
    if content != "missing":
        whole = (REFERENCE / "clip.mp4").read_bytes()
        path.write_bytes({"empty": b"", "text": b"no video", "truncated": whole[:3000]}[content])
    assert "bad.mp4" in failure(capsys, "run", str(path), "q", "--model", MODEL, "--json")


def test_a_track_that_is_not_there(capsys):
    assert "no video track" in failure(capsys, "run", SOUND, "q", "--model", MODEL, "--use", "video")


def test_damaged_weights(capsys, tmp_path):
    folder = shutil.copytree(REFERENCE, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    failure(capsys, *ASK, "--model", str(folder))


def test_ctrl_c_while_answering(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastav.pipelines.Pipeline.__call__", interrupted)
    assert main(ASK) == 130
    assert capsys.readouterr() == ("", "\ninterrupted\n")


def test_warnings_and_progress_bars_come_back(capsys):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    stdout(capsys, *ASK, "--plan", "none")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# without weights


@pytest.mark.parametrize(("drop", "percent"), [("0", 65.61), ("10", 58.99), ("20", 55.90), ("30", 54.38)])
def test_flops_gives_the_paper_s_column(drop, percent, capsys):
    report = json.loads(stdout(capsys, "flops", "videollama2", "--plan", "fastav", "--drop", drop, "--json"))
    assert report["prompt_tokens"] == {"video": 676, "audio": 1496, "text": 44}
    assert 100 * report["paper_flops"]["ratio"] == pytest.approx(percent, abs=0.005)
    assert 100 * report["flops"]["ratio"] == pytest.approx(percent, abs=0.6)
    assert report["kv_bytes"]["full"] == 28 * 2216 * 2 * 512 * 2
    assert [sum(layer.values()) for layer in report["tokens_per_layer"][:15]] == [2216] * 14 + [730]


def test_flops_in_the_paper_s_other_wording(capsys):
    report = json.loads(stdout(capsys, "flops", "--drop", "0", "--before", "750", "--json"))
    assert sum(report["tokens_per_layer"][14].values()) == 780


def test_flops_draws(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = stdout(capsys, "flops", "--video-tokens", "100", "--audio-tokens", "0", "--text-tokens", "20")
    assert "100 video + 20 text = 120 tokens" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("no/such/folder",), "no/such/folder"),
        (("--drop", "100"), "--drop"),
        (("--start", "28"), "28"),
        (("--keep-audio", "1", "--before", "2"), "both set the global cut"),
        (("--plan", "none", "--drop", "2"), "no global cut"),
    ],
)
def test_flops_refuses(arguments, found, capsys):
    assert found in failure(capsys, "flops", *arguments)


def test_models(capsys):
    (model,) = [m for m in json.loads(stdout(capsys, "models", "--json"))["models"] if m["name"] == "videollama2"]
    assert {"none", "fastav", "fastav-trim"} <= set(model["plans"])
    assert "videollama2" in stdout(capsys, "models")


def test_plan_show(capsys):
    report = json.loads(stdout(capsys, "plan", "show", "fastav", "--json"))
    assert report["plan"]["name"] == "fastav"
    assert len(report["tokens_per_layer"]) == 28
    assert "last-query" in stdout(capsys, "plan", "show", "fastav")
    assert "prunes nothing" in stdout(capsys, "plan", "show", "none", "--layers")


def test_plan_write_does_not_overwrite_unasked(capsys, tmp_path):
    path = tmp_path / "plan.json"
    write = ("plan", "write", "fastav", "--out", str(path))
    stdout(capsys, *write)
    first = path.read_text()
    assert "--force" in failure(capsys, *write, "--drop", "10")
    assert path.read_text() == first
    stdout(capsys, *write, "--drop", "10", "--force")
    assert path.read_text() != first
    assert os.listdir(tmp_path) == ["plan.json"]


def test_plan_write_says_where_it_cannot(capsys, tmp_path):
    assert "cannot write" in failure(capsys, "plan", "write", "fastav", "--out", str(tmp_path / "no" / "plan.json"))
    assert "decoder of 28 layers" in failure(
        capsys, "plan", "write", "fastav", "--out", str(tmp_path / "plan.json"), "--start", "40"
    )
    assert not list(tmp_path.iterdir())


def test_a_report_shows_the_answer_and_every_token(tmp_path, capsys):
    path = tmp_path / "answer.html"
    report = json.loads(stdout(capsys, *ASK, "--report", str(path), "--json"))
    assert report["report"] == str(path)
    data = json.loads(path.read_text().partition('id="data">')[2].partition("</script>")[0])
    (run,) = data["runs"]
    assert run["text"] == report["text"]
    assert run["usage"]["tokens_per_layer"] == report["tokens_per_layer"]
    assert len(run["inspection"]["tokens"]["layers"]) == sum(report["prompt_tokens"].values())
    assert main([*ASK, "--report", str(path)]) == 0
    assert f"wrote {path}" in capsys.readouterr().err


def test_a_report_of_a_comparison_has_all_plans(tmp_path, capsys):
    path = tmp_path / "answer.html"
    stdout(capsys, *ASK, "--compare", "--repeat", "1", "--plan", "fastav,fastv", "--report", str(path), "--json")
    data = json.loads(path.read_text().partition('id="data">')[2].partition("</script>")[0])
    assert [run["plan"] for run in data["runs"]] == ["none", "fastav", "fastv"]


@pytest.mark.parametrize(("name", "message"), [("no/answer.html", "does not exist"), (".", "is a folder")])
def test_a_report_that_cannot_be_written_is_refused_before_the_model_loads(
    tmp_path, capsys, monkeypatch, name, message
):
    monkeypatch.setattr("fastav.pipelines.pipeline", None)
    assert message in failure(capsys, *ASK, "--report", str(tmp_path / name))


def test_a_report_with_an_engine_that_shows_no_cuts_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastav.pipelines.pipeline", None)
    path = tmp_path / "answer.html"
    assert "does not expose its cuts" in failure(capsys, *ASK, "--engine", "vllm", "--report", str(path))
    assert not path.exists()
