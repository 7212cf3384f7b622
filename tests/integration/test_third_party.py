"""Another package brings a model: installed beside fastav, it is found by its entry point, also by the command line."""

import json
import os
import subprocess
import sys

import pytest

from support.command import failure

ADAPTER = """
from fastav.models.videollama2 import VideoLlama2Adapter


class DummyAdapter(VideoLlama2Adapter):
    name = "dummy-av"
    architectures = frozenset({"DummyAVForCausalLM"})
    checkpoint = "nobody/dummy-av"
"""
METADATA = "Metadata-Version: 2.1\nName: dummy-av-plugin\nVersion: 1.0\n"
ENTRY_POINTS = "[fastav.models]\ndummy-av = dummy_av_plugin:DummyAdapter\n"


@pytest.fixture
def installed(tmp_path):
    """A folder like site-packages, with the package in it."""
    (tmp_path / "dummy_av_plugin.py").write_text(ADAPTER)
    info = tmp_path / "dummy_av_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


SCRIPT = """
import contextlib, io, json, sys
from fastav.cli import main
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(command)
    print(json.dumps([code, out.getvalue()]))
"""


def beside(path, *commands):
    """Exit code and output of commands, in a process that finds the package."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_command_line_finds_it_lists_it_and_counts_with_it(installed, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["DummyAVForCausalLM"]}))
    by_path = ["flops", str(folder), "--json"]
    results = beside(installed, ["models", "--json"], ["flops", "dummy-av", "--json"], by_path)
    assert [code for code, _ in results] == [0, 0, 0]
    listed, counted, known = (json.loads(out) for _, out in results)
    assert listed["models"][-1] == {
        "name": "dummy-av",
        "checkpoint": "nobody/dummy-av",
        "plans": ["none", "fastav", "fastav-plus", "fastav-trim"],
        "architectures": ["DummyAVForCausalLM"],
    }
    assert counted["prompt_tokens"] == known["prompt_tokens"] == {"text": 44, "audio": 1496, "video": 676}

    err = failure(capsys, *by_path)  # here, without the package
    assert "no adapter knows the architecture DummyAVForCausalLM" in err
    assert "how to write an adapter" in " ".join(err.split())
