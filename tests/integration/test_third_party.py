"""Another package brings a model: installed beside fastav, it is found by its entry point, also by the command line."""

import json
import os
import subprocess
import sys

import pytest

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


def fastav(*arguments, path):
    script = "import sys; from fastav.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_line_lists_it_and_counts_with_it(installed):
    listed = json.loads(fastav("models", "--json", path=installed).stdout)["models"]
    assert listed[-1] == {
        "name": "dummy-av",
        "checkpoint": "nobody/dummy-av",
        "plans": ["none", "fastav", "fastav-plus", "fastav-trim"],
        "architectures": ["DummyAVForCausalLM"],
    }
    counted = fastav("flops", "dummy-av", "--json", path=installed)
    assert counted.returncode == 0, counted.stderr
    assert json.loads(counted.stdout)["prompt_tokens"] == {"text": 44, "audio": 1496, "video": 676}


def test_a_checkpoint_of_its_architecture_is_its(installed, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["DummyAVForCausalLM"]}))
    known = fastav("flops", str(folder), "--json", path=installed)
    assert known.returncode == 0, known.stderr
    unknown = fastav("flops", str(folder), "--json", path=tmp_path / "nothing")
    assert unknown.returncode == 2
    assert "no adapter knows the architecture DummyAVForCausalLM" in unknown.stderr
    assert "how to write one" in " ".join(unknown.stderr.split())
