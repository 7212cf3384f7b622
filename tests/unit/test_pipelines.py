"""What `fastav.pipeline` refuses before any weights load."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import fastav
from fastav.budgets import Share
from fastav.cli import main
from fastav.errors import CheckpointError, FastAVError, MissingTrack, PlanError, UnknownName, UnsupportedModel
from fastav.media import Clip
from fastav.models.videollama2 import VideoLlama2Processor
from fastav.pipelines import resolve
from fastav.plan import Keep, Plan, Step
from fastav.registry import MODELS
from fastav.request import Request

BUNDLE = Path(__file__).parents[1] / "reference" / "videollama2"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plan": "fastaw"}, UnknownName, "did you mean 'fastav'"),
        ({"plan": "missing.json"}, PlanError, "No such file"),
        ({"engine": "tensorflow"}, UnknownName, "no engine is called"),
        ({"device": "tpu"}, FastAVError, "device"),
        ({"dtype": "int3"}, FastAVError, "dtype"),
        (
            {"plan": Plan((Step(layers="9", method="position", keep=Keep(media=Share(0.5))),))},
            PlanError,
            "do not exist",
        ),
        (
            {"plan": Plan((Step(layers="1", method="given", keep=Keep(media=Share(0.5))),))},
            PlanError,
            "the method 'given', whose scores only a caller can pass.*scores=",
        ),
        (
            {"plan": Plan((Step(layers="1", method="random", options={"sed": 1}, keep=Keep(media=Share(0.5))),))},
            PlanError,
            "its options: seed",
        ),
    ],
)
def test_bad_options_are_refused_before_weights_load(monkeypatch, options, error, message):
    monkeypatch.setattr("fastav.models.videollama2.VideoLlama2Adapter.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(error, match=message):
        fastav.pipeline(str(BUNDLE), **options)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no model at"):
        resolve(str(tmp_path))


def test_a_folder_with_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    with pytest.raises(UnsupportedModel, match="BertModel"):
        resolve(str(tmp_path))


def test_a_broken_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no model at"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("change", [{"num_attention_heads": 0}, {"vocab_size": "a"}])
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path, change):
    config = json.loads((BUNDLE / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copytree(BUNDLE / "siglip-tiny-patch14", tmp_path / "siglip-tiny-patch14")
    with pytest.raises(FastAVError, match=r"is invalid|must be positive"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused(tmp_path, name):
    folder = shutil.copytree(BUNDLE, tmp_path / "copy")
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(CheckpointError, match="tokenizer"):
        fastav.pipeline(str(folder))


def test_a_file_is_no_model():
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(BUNDLE / "clip.mp4"))


def test_a_question_must_be_text():
    with pytest.raises(FastAVError, match="not UTF-8"):
        Request(clip=Clip.open(BUNDLE / "sound.wav"), question="bad \udcff")


def test_a_name_resolves_without_download():
    adapter, source, config = resolve("videollama2")
    assert source == adapter.checkpoint == "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV"
    assert config.num_hidden_layers == 28


def test_a_track_that_is_not_there_is_missed():
    pipe = fastav.pipeline(str(BUNDLE), plan="none", device="cpu")
    sound = Clip.open(BUNDLE / "sound.wav")
    with pytest.raises(MissingTrack, match=r"sound.wav has no video track"):
        pipe(sound, "What?", use="both")
    assert pipe(sound, "Please describe the audio:", max_new_tokens=1).prompt_tokens.keys() == {"text", "audio"}
    with pytest.raises(UnknownName, match="did you mean 'audio'"):
        pipe(sound, "What?", use="adio")
    with pytest.raises(FastAVError, match="exceed the model's 32768"):
        pipe(sound, "What?", max_new_tokens=32768)
    with pytest.raises(PlanError, match="max_new_tokens"):
        pipe(sound, "What?", max_new_tokens=0)


def test_the_engine_vllm_says_that_vllm_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(FastAVError, match="the engine vllm needs vLLM") as error:
        fastav.pipeline("qwen2-5-omni", engine="vllm")
    assert error.value.hint == "in a checkout of fastav: pip install '.[vllm]'"
    clip = str(BUNDLE / "clip.mp4")
    assert main(["run", clip, "What?", "--model", "qwen2-5-omni", "--engine", "vllm"]) == 2
    assert "pip install '.[vllm]'" in capsys.readouterr().err


def test_families_that_vllm_does_not_run_have_no_inputs_for_it():
    request = Request(clip=Clip.open(BUNDLE / "clip.mp4"), question="What?")
    processor = VideoLlama2Processor.from_pretrained(str(BUNDLE))
    assert MODELS["videollama2"]().vllm_inputs(processor, request).media == {"video": request.clip}
    with pytest.raises(UnsupportedModel, match="gemma4 has no inputs for vLLM"):
        MODELS["gemma4"]().vllm_inputs(processor, request)
