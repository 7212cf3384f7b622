"""`fastav eval` and `fastav leaderboard` on the reference checkpoint, whose weights are random."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import fastav
from fastav.cli import main
from fastav.evaluate import read
from support.command import failure, stdout
from support.little_task import REFERENCE, LittleTask

MODEL = str(REFERENCE)
EVAL = ("eval", MODEL, "little", "--device", "cpu")
SCRIPT = (
    "import sys; from fastav.cli import main; from fastav.registry import TASKS; from support.little_task import ENTRY;"
    "TASKS._plugins['little'] = ENTRY; sys.exit(main())"
)


pytestmark = pytest.mark.usefixtures("little")


@pytest.fixture(scope="module")
def made(little, tmp_path_factory) -> Path:
    """The rows of an evaluation that nothing disturbed."""
    path = tmp_path_factory.mktemp("made") / "rows.jsonl"
    assert main([*EVAL, "--out", str(path)]) == 0
    return path


@pytest.fixture
def path(made, tmp_path) -> Path:
    return shutil.copy(made, tmp_path / "rows.jsonl")


def said(path: Path) -> dict:
    return {row.key: (row.answer, row.score, row.prompt_tokens, row.flops) for row in read(path).rows}


def test_a_row_for_every_sample_and_plan(made):
    (run,) = read(made).runs
    assert (run["task"], run["model"], run["device"], run["dtype"]) == ("little", MODEL, "cpu", "float32")
    assert {"commit", "date"} <= run.keys()
    assert run["machine"]["cpu"]
    assert run["versions"].keys() >= {"fastav", "torch", "transformers"}
    rows = read(made).rows
    assert {row.key for row in rows} == {(str(n), plan) for n in range(4) for plan in ("none", "fastav")}
    assert {row.fingerprint for row in rows if row.plan == "none"} == {fastav.Plan().fingerprint}


def test_rows_hold_what_the_pipeline_answers(made):
    pipe = fastav.pipeline(MODEL, "fastav", device="cpu")
    (sample, *_) = LittleTask().samples()
    answer = pipe(sample.clip, sample.question, max_new_tokens=sample.max_new_tokens)
    row = next(row for row in read(made).rows if row.key == (sample.id, "fastav"))
    assert row.answer == answer.text
    assert row.score == len(answer.text) % 2
    assert row.gold == sample.answer
    assert row.prompt_tokens == answer.prompt_tokens
    assert row.flops == {"full": answer.flops.full, "pruned": answer.flops.pruned}
    assert row.kv_bytes == {"full": answer.kv_bytes.full, "pruned": answer.kv_bytes.pruned}
    assert row.seconds.keys() == answer.seconds.keys()
    assert row.new_tokens == len(answer.token_ids) == 2


def test_a_stopped_evaluation_goes_on_where_it_was(path, made, capsys, monkeypatch):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:50])
    asked = []
    generate = fastav.engines.transformers.TransformersEngine.generate
    monkeypatch.setattr(
        "fastav.engines.transformers.TransformersEngine.generate",
        lambda self, requests, plan, **options: (
            asked.append((requests[0].question, plan)) or generate(self, requests, plan, **options)
        ),
    )
    report = json.loads(stdout(capsys, *EVAL, "--out", str(path), "--json"))
    assert len(asked) == 3
    assert said(path) == said(made)
    assert len(report["runs"]) == 2
    assert report["plans"]["none"]["all"]["n"] == 4


def test_a_finished_evaluation_loads_no_model(path, capsys, monkeypatch):
    monkeypatch.setattr("fastav.models.videollama2.VideoLlama2Adapter.load", lambda *_, **__: pytest.fail("loaded"))
    out = stdout(capsys, *EVAL, "--out", str(path))
    assert "none     4" in out


def test_the_screen_fits_80_columns(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = stdout(capsys, *EVAL, "--out", str(path))
    assert max(map(len, out.splitlines())) <= 80
    for word in ("against unpruned", "FLOPs", "KV cache", "unparsed", "length", "sound", "commit", "Wilson"):
        assert word in out


def test_limit_and_families(capsys, tmp_path):
    path = str(tmp_path / "rows.jsonl")
    report = json.loads(stdout(capsys, *EVAL, "--plans", "none", "--limit", "2", "--out", path, "--json"))
    assert report["samples"] == 2
    assert report["reference"] == "none"
    assert list(report["plans"]["none"]["families"]) == ["clip", "sound"]
    assert report["plans"]["none"]["all"]["metrics"].keys() == {"length"}
    more = ("--plans", "none", "--families", "sound", "--out", path, "--json")
    assert json.loads(stdout(capsys, *EVAL, *more))["samples"] == 3


def test_plans_in_files_and_folders(capsys, tmp_path):
    folder = tmp_path / "plans"
    folder.mkdir()
    for drop in ("0", "50"):
        stdout(
            capsys, "plan", "write", "fastav", "--model", MODEL, "--drop", drop, "--out", f"{folder}/drop{drop}.json"
        )
    options = ("--plans", f"{folder},none", "--plans", f"{folder}/drop0.json", "--limit", "1", "--json")
    report = json.loads(stdout(capsys, *EVAL, *options))
    assert list(report["plans"]) == ["drop0", "drop50", "none"]
    ratios = [plan["all"]["flops_ratio"] for plan in report["plans"].values()]
    assert 1 == ratios[2] > ratios[0] > ratios[1]

    (tmp_path / "drop0.json").write_text((folder / "drop50.json").read_text())
    assert "two plans have the name 'drop0'" in failure(capsys, *EVAL, "--plans", f"{folder},{tmp_path}/drop0.json")


def test_a_sample_that_fails_ends_it_by_name(path, capsys, monkeypatch):
    monkeypatch.setenv("LITTLE_BROKEN", "1")
    assert main([*EVAL, "--out", str(path)]) == 2
    err = capsys.readouterr().err
    assert "error: sample 'broken' under plan 'none': " in err
    assert "no.mp4" in err
    assert "hint: --keep-going" in err


def test_keep_going_counts_failures_and_tries_them_again(path, capsys, monkeypatch):
    monkeypatch.setenv("LITTLE_BROKEN", "1")
    for _ in range(2):
        report = json.loads(stdout(capsys, *EVAL, "--out", str(path), "--keep-going", "--json"))
        assert (report["plans"]["none"]["all"]["n"], report["plans"]["none"]["all"]["errors"]) == (4, 1)
        (row,) = [row for row in read(path).rows if row.key == ("broken", "fastav")]
        assert "no.mp4" in row.error
    assert path.read_text().count('"broken"') == 4
    assert "none: 1 of 5 failed and are left out" in stdout(capsys, "leaderboard", str(path))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (("--plans", "fastaw"), "did you mean 'fastav'"),
        (("--plans", ""), "no plan to evaluate"),
        (("--plans", "."), "no plans in the folder"),
        (("--families", "smell"), "no family of samples is called 'smell'"),
        (("--device", "abacus"), "abacus"),
        (("--out", "no/such/folder/rows.jsonl"), "no/such/folder"),
        (("--out", __file__), "is not a file of rows"),
    ],
)
def test_bad_options_are_refused_before_weights_load(changes, found, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastav.models.videollama2.VideoLlama2Adapter.load", lambda *_, **__: pytest.fail("loaded"))
    assert found in failure(capsys, *EVAL, *changes)


def test_an_empty_question_is_refused_before_anything_is_written(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LITTLE_EMPTY", "1")
    for command in ("eval", "ablate"):
        told = failure(capsys, command, *EVAL[1:], "--out", str(tmp_path / "rows.jsonl"))
        assert "sample 'empty' of little: the question is empty" in told
    assert list(tmp_path.iterdir()) == []


def test_another_evaluation_s_file_is_refused(path, capsys):
    before = path.read_bytes()
    assert "has rows of other plans" in failure(capsys, *EVAL, "--plans", "none", "--out", str(path))
    assert path.read_bytes() == before


def test_bad_tasks(capsys, monkeypatch):
    assert "no task is called 'litle'" in failure(capsys, "eval", MODEL, "litle")
    monkeypatch.setattr(LittleTask, "needs_folder", True)
    assert "--folder" in failure(capsys, *EVAL)
    monkeypatch.setattr(LittleTask, "needs_folder", False)
    monkeypatch.setenv("LITTLE_SAMPLES", "0")
    assert "has no samples" in failure(capsys, *EVAL)
    monkeypatch.setenv("LITTLE_SAMPLES", "1")
    twice = [*LittleTask().samples()] * 2
    monkeypatch.setattr(LittleTask, "samples", lambda _: iter(twice))
    assert "two samples of little have the id '0'" in failure(capsys, *EVAL)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_before_weights_load(capsys, monkeypatch):
    monkeypatch.setattr("fastav.models.videollama2.VideoLlama2Adapter.load", lambda *_, **__: pytest.fail("loaded"))
    assert "No space left" in failure(capsys, *EVAL, "--out", "/dev/full")


# several processes, started from one without what tests/conftest.py mends, which a spawned one would lack


@pytest.fixture
def _unmended(monkeypatch):
    """What tests/conftest.py puts on the path is not handed to processes that this one starts."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(Path(sys.prefix) / "vision")])


def apart(*arguments: str, **environment: str) -> subprocess.Popen:
    """The command in a process group of its own."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def alive(group: int) -> list[str]:
    """What still runs of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")
            state, _, its_group, *_ = rest.split()
            found += [name] * (int(its_group) == group and state != "Z")
    return found


def hearing_ctrl_c(group: int) -> list[str]:
    """Which processes that answer for a command would hear SIGINT themselves."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            its_group = (folder / "stat").read_text().rpartition(")")[2].split()[2]
            called = (folder / "cmdline").read_text()
            blocked = re.search(r"^SigBlk:\s*(\w+)$", (folder / "status").read_text(), re.MULTILINE)
            if int(its_group) == group and "spawn_main" in called and blocked:
                found += [folder.name] * (not int(blocked[1], 16) & 1 << signal.SIGINT - 1)
    return found


@pytest.mark.slow  # three processes that import torch; what two of them answer is compared below, too
def test_two_processes_answer_what_one_does(made, tmp_path):
    path = tmp_path / "rows.jsonl"
    process = apart(*EVAL, "--jobs", "2", "--out", str(path), "--json")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert said(path) == said(made)
    assert json.loads(out)["plans"]["fastav"]["all"]["n"] == 4


@pytest.mark.usefixtures("_unmended")
def test_a_process_that_dies_is_told(capfd, monkeypatch):
    monkeypatch.setenv("LITTLE_DEADLY", "1")
    monkeypatch.setenv("LITTLE_SAMPLES", "1")
    assert main([*EVAL, "--jobs", "2", "--plans", "none"]) == 2
    assert capfd.readouterr().err == "error: a process ended with exit code 7\nhint: out of memory? try fewer --jobs\n"


@pytest.mark.usefixtures("_unmended")
def test_what_a_process_warns_of_is_told_once(capfd, monkeypatch, tmp_path):
    whole = (REFERENCE / "sound.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setenv("LITTLE_CUT", str(tmp_path / "cut.wav"))
    monkeypatch.setenv("LITTLE_SAMPLES", "0")
    assert main([*EVAL, "--jobs", "2", "--plans", "none"]) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"warning: cut\.wav has \d+ of \d+ kB: it is cut short", line)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_leaves_a_file_that_goes_on(made, capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    process = apart(*EVAL, "--jobs", "2", "--out", str(path), LITTLE_SAMPLES="1000")
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") > 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert hearing_ctrl_c(process.pid) == []
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 130
    assert out == ""
    assert err.endswith(f"answers are in {path}; run the same command again to continue\n\ninterrupted\n")
    assert "Traceback" not in err
    while alive(process.pid):  # that which tracks resources of multiprocessing leaves a moment later
        assert time.monotonic() < deadline
        time.sleep(0.05)

    done = said(path)
    assert len(done) >= 2
    stdout(capsys, *EVAL, "--out", str(path))
    assert done.items() <= said(path).items()
    assert said(path).items() >= said(made).items()


# leaderboard


def test_leaderboard_draws_and_writes_tables(path, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    svg, table = tmp_path / "chart.svg", tmp_path / "table.md"
    out = stdout(capsys, "leaderboard", str(path), str(path), "--out", str(svg), "--markdown", str(table))
    assert max(map(len, out.splitlines())) <= 80
    assert "<svg" in svg.read_text()
    assert "| fastav | 4 |" in table.read_text()
    first = svg.read_text()
    stdout(capsys, "leaderboard", str(path), "--out", str(svg))
    assert svg.read_text() == first
    picture = tmp_path / "chart.png"
    stdout(capsys, "leaderboard", str(path), "--out", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_chart_of_another_kind_is_refused_and_nothing_is_written(path, capsys, tmp_path):
    table = tmp_path / "table.md"
    err = failure(capsys, "leaderboard", str(path), "--out", str(tmp_path / "chart.gif"), "--markdown", str(table))
    assert "cannot be written as a .gif file" in err
    assert not table.exists()


def test_what_is_printed_as_json_names_its_schema(path, capsys):
    assert json.loads(stdout(capsys, "leaderboard", str(path), "--json"))["schema_version"] == 1


def test_leaderboard_needs_no_torch(path):
    code = "import sys; from fastav.cli import main; main(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "leaderboard", str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("False\n")


def test_leaderboard_refuses_what_is_no_file_of_rows(capsys, tmp_path):
    assert "cannot read" in failure(capsys, "leaderboard", str(tmp_path / "no.jsonl"))
    assert "is not a file of rows" in failure(capsys, "leaderboard", __file__)
