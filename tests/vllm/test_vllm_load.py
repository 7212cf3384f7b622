"""The load benchmark's clients and servers, against a server that does what it is told; and all of it once, small."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from benchmarks.load.__main__ import main
from benchmarks.load.clients import run_clients
from benchmarks.load.questions import QuestionSet
from benchmarks.load.server import serving

from fastav.errors import FastAVError
from fastav.registry import MODELS

ACTOR = Path(__file__).with_name("acting_server.py")
COMMAND = [sys.executable, str(ACTOR)]


def play(tmp_path, numbers, clients=2, patience=10):
    with serving(COMMAND, {"PART": "answer"}, tmp_path / "log", seconds=30) as server:
        return run_clients(server, QuestionSet(MODELS["qwen2-5-vl"]()), numbers, clients, new=3, patience=patience)


def family(pid):
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def gone(pids):
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_every_question_is_asked_once_and_answers_are_timed(tmp_path):
    result = play(tmp_path, range(10), clients=3)
    assert sorted(completion.number for completion in result.completions) == list(range(10))
    for completion in result.completions:
        assert completion.error == ""
        assert completion.tokens == (completion.number, 7, 8)
        assert completion.prompt == 40
        assert completion.first >= 0.05
        assert len(completion.gaps) == 2
        assert completion.gaps[0] == completion.gaps[1] > 0, "which came together"
    assert result.seconds >= 4 * 0.1
    assert result.after.preemptions - result.metrics[0].preemptions == 0


def test_what_is_not_answered_is_told(tmp_path):
    result = play(tmp_path, [1, 101, 102, 103], patience=2)
    errors = {completion.number: completion.error for completion in result.completions}
    assert errors[1] == ""
    assert "500" in errors[101]
    assert errors[102] == "1 tokens came, not 3"
    assert "TimeoutError" in errors[103]


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path):
    ends = serving(COMMAND, {"PART": "end"}, tmp_path / "log", seconds=30)
    with pytest.raises(FastAVError, match=r"ended with exit code 3: \.\.\.there is no model"), ends:
        pass
    slow = serving(COMMAND, {"PART": "sleep"}, tmp_path / "log", seconds=1)
    with pytest.raises(FastAVError, match="not ready after 1 s"), slow:
        pass


def test_nothing_is_left_of_a_server_and_its_children(tmp_path):
    pids = []

    def fail(server):
        pids.extend(family(server._process.pid))
        assert server.cpu() > 0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), serving(COMMAND, {"PART": "answer"}, tmp_path / "log", seconds=30) as server:
        fail(server)
    assert len(pids) == 2
    assert gone(pids)


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_an_interrupted_benchmark_leaves_no_server(tmp_path, signals):
    script = f"""
import sys
from benchmarks.load import __main__ as command
from benchmarks.load.server import serving
from pathlib import Path
import time
def measure(*_):
    with serving({COMMAND!r}, {{"PART": "stubborn"}}, Path({str(tmp_path)!r}) / "log", seconds=30) as server:
        print(server._process.pid, flush=True)
        time.sleep(60)
command._measure = measure
sys.exit(command.main([]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pids = family(int(process.stdout.readline()))
        for one in signals:
            process.send_signal(one)
            time.sleep(1)
        assert process.wait(60) != 0
    assert len(pids) == 2
    assert gone(pids)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["small-omni", "small-vl"])
def test_a_small_model_is_served_by_turns(tmp_path, model, monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    given = ["--model", model, "--rounds", "1", "--clients", "2,3", "--least", "8", "--new-tokens", "4"]
    contenders = "off,fastav"
    assert main([*given, "--contenders", contenders, "--minutes", "20", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / f"load-{model}-cpu.json").read_text())
    assert [(row["contender"], row["clients"]) for row in report["rows"]] == [
        (name, clients) for clients in (2, 3) for name in contenders.split(",")
    ]
    assert all(row["answered"] == row["asked"] == 8 for row in report["rows"])
    assert not report["wrong"]
    assert report["answers"]["fastav"]["again"] == 8
    assert report["answers"]["fastav"]["as_off"] < 8, "answers of pruned clips are others"
    for prompt in report["prompts"]:
        assert prompt["counted"]["off"] == prompt["counted"]["fastav"] == prompt["tokens"]
        if "video" in prompt["by_modality"]:
            assert prompt["last_layer"]["fastav"] < prompt["tokens"] / 2
