"""What `fastav.pipeline`, its pipelines, requests and clips take, and what they say of anything else."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

import fastav
from fastav.errors import FastAVError, InstallationError, UnknownName, UnreadableMedia
from fastav.media import Clip
from fastav.pipelines import Pipeline
from fastav.request import Request, Use, clip_of

CLIPS = Path(str(files("fastav") / "assets" / "clips"))
TRIANGLE, KNOCK = CLIPS / "triangle.mp4", CLIPS / "knock.mp4"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return fastav.pipeline(device="cpu")


# --- types of weights, attention


@pytest.mark.parametrize(
    ("dtype", "found"), [(torch.bfloat16, "bfloat16"), ("bfloat16", "bfloat16"), ("auto", "float16"), (None, "float32")]
)
def test_a_dtype_is_a_name_or_torchs_own_or_the_checkpoints(dtype, found):
    assert fastav.pipeline(device="cpu", dtype=dtype).engine.dtype == found


@pytest.mark.parametrize("dtype", ["int3", torch.float64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(FastAVError, match="dtype must be float32, bfloat16, float16, auto, got"):
        fastav.pipeline(dtype=dtype)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_that_is_not_installed_is_named_before_weights_load(attention, monkeypatch):
    monkeypatch.setattr("fastav.models.tiny.TinyAdapter.load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("fastav.installation.find_spec", lambda _: None)
    with pytest.raises(InstallationError, match=f"'{attention}' needs the package flash_attn") as error:
        fastav.pipeline(attention=attention)
    assert "attention='sdpa'" in error.value.hint


def test_unknown_attention_is_corrected():
    with pytest.raises(FastAVError, match=r"no attention is called|not supported while pruning"):
        fastav.pipeline(attention="spda")
    with pytest.raises(UnknownName, match="did you mean 'sdpa'"):
        fastav.pipeline(attention="spda", plan="none")


# --- clips and requests


def test_a_request_takes_a_path():
    for path in (TRIANGLE, str(TRIANGLE)):
        assert Request(clip=path, question="what?").clip.name == "triangle.mp4"
    with pytest.raises(UnreadableMedia, match="no such file"):
        Request(clip="missing.mp4", question="what?")


@pytest.mark.parametrize("clip", [3, None, {"path": "a.mp4"}, np.zeros((2, 2))])
def test_a_request_takes_nothing_else(clip):
    with pytest.raises(FastAVError, match=r"clip"):
        clip_of(clip)


TENSORS = {
    "float32": lambda sound: sound,
    "gradient": lambda sound: sound.requires_grad_(),
    "bfloat16": lambda sound: sound.bfloat16(),
    "list": lambda sound: sound.tolist(),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_clip_takes_tensors(kind):
    frames = torch.randint(0, 256, (4, 6, 8, 3), dtype=torch.uint8)
    sound = torch.linspace(-1, 1, 800)
    clip = Clip.from_arrays(frames=frames, waveform=TENSORS[kind](sound.clone()), sample_rate=16000)
    assert clip.video is not None
    assert clip.audio is not None
    np.testing.assert_array_equal(clip.video.read([0, 3]), frames[[0, 3]].numpy())
    close = 4e-3 if kind == "bfloat16" else 1e-6
    np.testing.assert_allclose(clip.audio.native(channel=0), sound.numpy(), atol=close)


def test_frames_of_another_order_are_told_how_to_turn():
    with pytest.raises(UnreadableMedia, match="put the channels last"):
        Clip.from_arrays(frames=torch.zeros(4, 3, 6, 8, dtype=torch.uint8))
    with pytest.raises(UnreadableMedia, match=r"scale them to 0\.\.255"):
        Clip.from_arrays(frames=torch.zeros(4, 6, 8, 3))


# --- lists


def test_lists_are_answered_by_lists_in_their_order(pipe):
    clips, questions = [TRIANGLE, str(KNOCK)], ["which shape moves?", "when does the knock come?"]
    single = [pipe(clip, question).text for clip, question in zip(clips, questions, strict=True)]
    requests = [Request(clip=Clip.open(c), question=q) for c, q in zip(clips, questions, strict=True)]
    for answers in (pipe(clips, questions), pipe(requests), pipe(tuple(clips), questions, batch=1)):
        assert [answer.text for answer in answers] == single
    assert [answer.text for answer in pipe(TRIANGLE, [questions[0]] * 2)] == [single[0]] * 2
    assert [answer.text for answer in pipe([TRIANGLE], questions[0])] == [single[0]]
    assert pipe(requests[1]).text == single[1]
    assert pipe([], []) == []


@pytest.mark.parametrize(
    ("clip", "question", "options", "message"),
    [
        ([TRIANGLE, KNOCK], ["what?"], {}, "2 clips and 1 question cannot be paired"),
        ([TRIANGLE], "what?", {"on_text": print}, "on_text"),
        ([TRIANGLE], [3], {}, "a question must be a string, got int"),
        (TRIANGLE, None, {}, "a question must be a string, got NoneType"),
        ([TRIANGLE, "missing.mp4"], "what?", {}, "no such file"),
        ([TRIANGLE, 3], "what?", {}, "a clip must be"),
        (Request(clip=Clip.open(TRIANGLE), question="what?"), "which?", {}, "has its own question"),
        ([TRIANGLE], "what?", {"batch": 0}, "batch must be at least 1"),
    ],
)
def test_lists_that_make_no_requests_are_one_error(pipe, clip, question, options, message):
    with pytest.raises(FastAVError, match=message):
        pipe(clip, question, **options)


def test_the_first_error_of_a_list_is_raised(pipe):
    silent = Clip.from_arrays(waveform=np.zeros(16000, np.float32), sample_rate=16000)
    with pytest.raises(FastAVError, match="has no video track"):
        pipe([TRIANGLE, silent], "which shape moves?", use="video")


def test_a_use_is_a_name_or_the_enum():
    clip = Clip.open(TRIANGLE)
    assert Request(clip=clip, question="what?", use="audio").use is Use.AUDIO


def test_a_pipeline_and_a_clip_show_what_they_are(pipe):
    assert repr(pipe) == "Pipeline('tiny', plan='fastav': TransformersEngine on cpu in float32)"
    assert repr(Clip.open(TRIANGLE)).startswith("Clip(name='triangle.mp4', video=VideoTrack(frames=32, fps=8.0")
