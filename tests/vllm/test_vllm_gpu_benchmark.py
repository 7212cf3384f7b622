"""The benchmark for a GPU, from end to end on a CPU: exactness of a small model, then servers under load."""

import json
import signal
import subprocess
import sys

import psutil
import pytest
from benchmarks.gpu_vllm.__main__ import main

NAMES = ("off", "fastav", "fastav-plus@0.25")
EVERY = ("together and alone", "vLLM and transformers", "chunks and whole prompt")
SMALL = ["--shape", "small", "--clients", "1,4", "--new-tokens", "8"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_small_model_is_checked_and_served(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    minutes = 5  # two are enough for two cores without other work
    assert main([*SMALL, "--minutes", f"{minutes}", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu-vllm-small-cpu.json").read_text())
    assert not report["wrong"]
    assert sum(report["seconds"].values()) < 60 * minutes + 20
    assert all(one["passed"] for one in report["exactness"])
    assert {(one["check"], one["plan"]) for one in report["exactness"]} == {
        *((check, plan) for check in EVERY for plan in ("none", *NAMES[1:])),
        *(("prefix cache and whole prompt", plan) for plan in ("none", "fastav")),
    }
    assert [(row["contender"], row["clients"]) for row in report["rows"]] == [(n, c) for c in (1, 4) for n in NAMES]
    assert all(row["answered"] == row["asked"] > 0 for row in report["rows"])
    assert report["versions"]["vllm"]
    assert report["machine"]["cpu"]
    for prompt in report["prompts"]:
        assert len(set(prompt["counted"].values()) | {prompt["tokens"]}) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_leaves_no_engine(tmp_path):
    words = ["-m", "benchmarks.gpu_vllm", *SMALL, "--cache", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *words],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("vllm: asking")
        own = psutil.Process(process.pid)
        while not (children := own.children(recursive=True)):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
