"""How models are named, and what is said where there is no such model or the hub does not answer."""

import json
import shutil
import time
from inspect import unwrap
from pathlib import Path

import huggingface_hub.constants
import pytest

import fastav
from fastav.cli import main
from fastav.errors import CheckpointError, FastAVError, PlanError, UnknownName
from fastav.formatting import join_or
from fastav.pipelines import resolve
from fastav.registry import MODELS, unknown_name
from fastav.sources import find_source, reachable

BUNDLE = Path(__file__).parents[1] / "reference" / "videollama2"
NOWHERE = "http://127.0.0.1:9"  # the port that drops everything; nothing listens there


@pytest.fixture
def no_hub(monkeypatch, tmp_path) -> Path:
    """A hub that nobody can reach; returns the cache's folder."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", NOWHERE + "/{repo_id}/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tinny", "tiny"),
        ("qwen2.5-omni", "qwen2-5-omni"),
        ("Qwen2_5-VL", "qwen2-5-vl"),
        ("VideoLLaMA2", "videollama2"),
        ("video salmonn 2", "video-salmonn2"),
        ("gemma-4", "gemma4"),
    ],
)
def test_a_misspelt_name_is_corrected_and_no_hub_is_asked(name, meant, monkeypatch):
    monkeypatch.setattr("fastav.sources.get_hf_file_metadata", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UnknownName, match=f"no model is called '{name}'") as error:
        resolve(name)
    assert error.value.hint.startswith(f"did you mean {meant!r}")
    assert error.value.hint.endswith(
        "? If not, a model is a name (fastav models), a local folder, or a hub id like owner/name"
    )


def test_what_differs_in_dots_and_case_alone_is_the_one_name_meant():
    assert unknown_name("model", "Qwen2.5-Omni", MODELS).hint == "did you mean 'qwen2-5-omni'?"


def test_names_that_may_be_meant_are_listed_as_in_a_sentence():
    assert [join_or(["red", "rat", "rod"][:count]) for count in (1, 2, 3)] == ["red", "red or rat", "red, rat or rod"]
    assert unknown_name("colour", "read", ["red", "rat"]).hint == "did you mean 'red' or 'rat'?"


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_at_all_is_no_model(name):
    with pytest.raises(UnknownName, match=r"the name of the model is empty \(a model is a name"):
        resolve(name)


def test_a_folder_that_is_not_there_is_said_to_be_none():
    for path in ("./tiny", "/no/such/folder", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"the folder .* does not exist"):
            find_source(path)


def test_a_hub_that_cannot_be_reached_is_one_error_within_seconds(no_hub, capsys):
    start = time.perf_counter()
    assert main(["flops", "some-owner/some-model"]) == 2
    assert time.perf_counter() - start < 15  # one try; six of them, as transformers makes, wait 23 s in between
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: the hub cannot be reached for 'some-owner/some-model', and its cache has no copy: ")
    assert hint.startswith("hint: check the network")


def test_weights_of_a_known_name_are_missed_as_quickly(no_hub, monkeypatch):
    monkeypatch.setattr("fastav.models.videollama2.VideoLlama2Adapter.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(CheckpointError, match="the hub cannot be reached for 'DAMO-NLP-SG"):
        fastav.pipeline("videollama2")


def test_offline_mode_is_named_as_the_reason(monkeypatch, no_hub):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="offline mode is enabled"):
        reachable("some-owner/some-model")


def test_what_the_cache_has_is_used_while_the_hub_cannot_be_reached(no_hub):
    commit = "0" * 40
    cached = no_hub / "models--some-owner--some-model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    folder = shutil.copytree(BUNDLE, cached / "snapshots" / commit)
    adapter, source, config = resolve("some-owner/some-model")
    assert (adapter.name, Path(source)) == ("videollama2", folder)
    assert config.num_hidden_layers == json.loads((BUNDLE / "config.json").read_text())["num_hidden_layers"]


@pytest.mark.parametrize("model", [object(), None, 3])
def test_a_model_object_is_referred_to_prune(model):
    with pytest.raises(FastAVError, match=r"got (object|NoneType|int) .*fastav\.prune\(model"):
        unwrap(fastav.pipeline)(model)  # unwrapped: the tests check types before it can


def test_a_path_names_a_folder(monkeypatch):
    monkeypatch.setattr(
        "fastav.models.videollama2.VideoLlama2Adapter.load", lambda *_, **__: (_ for _ in ()).throw(KeyError)
    )
    with pytest.raises(KeyError):
        fastav.pipeline(BUNDLE)


@pytest.mark.parametrize("plan", [None, 0.5, ["fastav"]])
def test_a_plan_of_another_type_is_refused(plan):
    with pytest.raises(PlanError, match=r"must be a fastav\.Plan or a name"):
        unwrap(fastav.pipeline)("tiny", plan=plan)
