"""Inspections as JSON, and the page of answers around them."""

import base64
import json
import subprocess
import sys
from dataclasses import replace
from inspect import unwrap
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import fastav
from fastav.errors import FastAVError
from fastav.inspection import Cut, Inspection
from fastav.layout import Layout, Modality
from fastav.media import Clip
from fastav.report import answer_report, to_json
from fastav.report.answer import run_of
from fastav.request import Request
from support.toy import scene_request

TOKENS = ("modality", "item", "frame", "second", "box", "padding", "text", "layers")


@pytest.fixture(scope="module")
def pipe():
    return fastav.pipeline("tiny", device="cpu")


@pytest.fixture(scope="module")
def request_():
    return scene_request("what colour is the square?")


@pytest.fixture(scope="module")
def data(pipe, request_):
    return to_json(pipe.inspect(request_), request_)


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(uri.partition("base64,")[2]))), np.int64)


def frames_request(count: int, size: tuple[int, int] = (24, 480), fps: float = 1.0) -> Request:
    """A clip whose frames have the grey level of their index."""
    frames = np.stack([np.full((*size, 3), index, np.uint8) for index in range(count)])
    return Request(clip=Clip.from_arrays(frames=frames, fps=fps, name="grey.mp4"), question="what?")


def inspection_of(pipe, layout: Layout, **changes) -> Inspection:
    made = pipe.inspect(scene_request("what?"), plan="none")
    return replace(made, layout=layout, texts=[None] * len(layout), **changes)


def test_every_token_has_its_entry(data, pipe, request_):
    inspection = pipe.inspect(request_)
    tokens = data["tokens"]
    assert set(tokens) == set(TOKENS)
    assert {len(values) for values in tokens.values()} == {len(inspection.layout)}
    assert data["modalities"] == ["text", "audio", "video", "image"]
    assert tokens["layers"] == inspection.layers.tolist()
    assert (data["model"], data["plan"], data["layers"]) == ("tiny", "fastav", inspection.depth)
    assert fastav.Plan.from_json(json.dumps(data["plan_json"])) == pipe.plan
    for modality, box, frame in zip(tokens["modality"], tokens["box"], tokens["frame"], strict=True):
        assert (box is not None) == (frame >= 0) == (modality == Modality.VIDEO)
    assert [text is None for text in tokens["text"]] == [m != Modality.TEXT for m in tokens["modality"]]


def test_cuts_lead_to_the_layers_of_the_tokens(data):
    layers = [data["layers"]] * len(data["tokens"]["layers"])
    for cut in data["cuts"]:
        assert len(cut["token"]) == len(cut["score"]) == len(cut["kept"])
        assert not cut["cache_only"]
        for token, kept in zip(cut["token"], cut["kept"], strict=True):
            if not kept:
                layers[token] = cut["layer"]
    assert layers == data["tokens"]["layers"]
    assert {cut["method"] for cut in data["cuts"]} == {"position", "last-query"}


def test_it_is_strict_json(data):
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_a_sound_has_an_outline(data):
    (item,) = data["items"]
    wave = item["waveform"]
    assert len(wave["low"]) == len(wave["high"]) <= 800
    assert all(-1 <= low <= high <= 1 for low, high in zip(wave["low"], wave["high"], strict=True))
    assert wave["seconds"] == pytest.approx(item["seconds"], abs=0.1)


def test_pictures_are_the_frames_that_tokens_show(pipe):
    request = frames_request(60)
    data = to_json(pipe.inspect(request), request)
    (item,) = data["items"]
    assert (item["kind"], item["name"], item["waveform"]) == ("video", "grey.mp4", None)
    assert "frames_shown" not in item
    assert [frame["frame"] for frame in item["frames"]] == sorted({n for n in data["tokens"]["frame"] if n >= 0})
    for frame in item["frames"]:
        picture = pixels(frame["uri"])
        assert picture.shape == (frame["height"], frame["width"], 3) == (16, 320, 3)
        assert np.abs(picture - round(frame["second"])).max() <= 2  # at one frame a second, the grey level


def test_many_frames_are_thinned_evenly(pipe):
    request = frames_request(200)
    frame = np.arange(200)
    layout = Layout.of(Modality.VIDEO, 200, frame=frame, second=frame.astype(float))
    (item,) = to_json(inspection_of(pipe, layout), request)["items"]
    assert [one["frame"] for one in item["frames"]] == list(range(200))
    pictured = [one for one in item["frames"] if one["uri"] is not None]
    shown = [one["frame"] for one in pictured]
    assert len(shown) == item["frames_shown"] == 64
    assert (shown[0], shown[-1]) == (0, 199)
    assert set(np.diff(shown)) <= {3, 4}
    assert all(np.abs(pixels(one["uri"]) - one["frame"]).max() <= 2 for one in pictured)


def test_without_pictures_nothing_is_decoded(pipe, request_, monkeypatch):
    inspection = pipe.inspect(request_)
    monkeypatch.setattr("fastav.media.VideoTrack.each", None)
    monkeypatch.setattr("fastav.media.AudioTrack.read", None)
    (item,) = to_json(inspection, request_, pictures=False)["items"]
    assert item["waveform"] is None
    assert item["frames"]
    assert all(frame["uri"] is None for frame in item["frames"])


def test_frames_of_unknown_time_have_no_picture(pipe):
    request = frames_request(4)
    layout = Layout.of(Modality.VIDEO, 4, frame=np.arange(4))
    data = to_json(inspection_of(pipe, layout), request)
    assert [(one["second"], one["uri"]) for one in data["items"][0]["frames"]] == [(None, None)] * 4
    assert data["tokens"]["second"] == [None] * 4


def test_an_image_is_a_frame(pipe):
    picture = Clip.from_arrays(frames=np.full((1, 30, 40, 3), 77, np.uint8), fps=1.0, name="grey.png")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]
    request = Request(messages=[{"role": "user", "content": content}])
    data = to_json(inspection_of(pipe, Layout.of(Modality.IMAGE, 4)), request)
    assert data["tokens"]["frame"] == [0] * 4
    (item,) = data["items"]
    assert item["kind"] == "image"
    assert np.abs(pixels(item["frames"][0]["uri"]) - 77).max() <= 2


def test_scores_are_short_and_none_where_there_is_none(pipe, request_):
    cut = Cut(
        layer=1,
        method="position",
        is_cache_only=True,
        tokens=np.array([4, 5]),
        scores=np.array([1 / 3, np.inf]),
        kept=np.array([True, False]),
    )
    data = to_json(replace(pipe.inspect(request_), cuts=(cut,)), request_, pictures=False)
    assert data["cuts"][0]["score"] == [0.333333, None]
    assert data["cuts"][0]["cache_only"]
    assert set(data["tokens"]["layers"]) == {data["layers"]}
    assert repr(cut) == "Cut(position at the cache of layer 1: 1 of 2 tokens stay)"


def test_one_prompt_is_inspected_at_a_time(pipe, request_):
    with pytest.raises(FastAVError, match="an inspection is of one prompt"):
        unwrap(type(pipe).inspect)(pipe, [request_])  # unwrapped: the tests check types before it can


# --- the page


def report_of(pipe, request: Request, *plans: str) -> str:
    runs = [run_of(to_json(pipe.inspect(request, plan=plan), request), pipe(request, plan=plan)) for plan in plans]
    return answer_report(runs)


def embedded(page: str) -> dict:
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


def test_a_page_holds_its_data_and_nothing_outside(pipe, request_):
    page = report_of(pipe, request_, "none", "fastav")
    assert "{{" not in page.replace("${{", "")
    assert "http://" not in page.replace("http://www.w3.org", "")
    data = embedded(page)
    assert [run["plan"] for run in data["runs"]] == ["none", "fastav"]
    assert (data["schema"], data["model"], data["version"]) == (1, "tiny", fastav.__version__)
    for run in data["runs"]:
        assert set(run["usage"]) == {"plan", "prompt_tokens", "tokens_per_layer", "flops", "kv_bytes", "seconds"}
        assert run["usage"]["flops"] == run["inspection"]["flops"]
        layers = run["inspection"]["tokens"]["layers"]
        counts = [sum(counts.values()) for counts in run["usage"]["tokens_per_layer"]]
        assert counts == [sum(layer > n for layer in layers) for n in range(len(counts))]


def test_a_question_cannot_break_the_page(pipe):
    question = "</script><script>alert(1)</script> /*{{js}}*/ {{data}} what?"
    with pytest.warns(fastav.FastAVWarning):
        page = report_of(pipe, scene_request(question), "fastav")
    assert "<script>alert" not in page
    assert embedded(page)["question"] == question


def test_it_needs_no_extra():
    code = (
        "import sys; sys.modules.update(jinja2=None, matplotlib=None); "
        "from fastav.report import answer_report, to_json; print(answer_report.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "answer_report\n"
