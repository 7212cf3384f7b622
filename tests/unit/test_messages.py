"""Chat messages: what they may contain, what it becomes, and errors that name the place."""

import base64
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastav
from fastav.errors import FastAVError, MediaError, MissingTrack, UnknownName, UnreadableMedia
from fastav.media import Clip, MediaPolicy
from fastav.messages import Kind, Message, Use, messages_of
from fastav.pipelines import Pipeline
from fastav.registry import MODELS
from fastav.request import Request

CLIPS = Path(str(files("fastav") / "assets" / "clips"))
TRIANGLE, KNOCK = CLIPS / "triangle.mp4", CLIPS / "knock.mp4"
FRAMES = np.zeros((6, 24, 32, 3), np.uint8)
WAVE = np.zeros(1600, np.float32)


def ask(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(parts)}]


def text(words: str = "What moves?") -> dict[str, str]:
    return {"type": "text", "text": words}


# --- media


@pytest.mark.parametrize(
    "source",
    [
        {"video": str(TRIANGLE)},
        {"path": TRIANGLE},
        {"url": TRIANGLE.as_uri()},
        {"video": TRIANGLE.read_bytes()},
        {"video": BytesIO(TRIANGLE.read_bytes())},
        {"video": Clip.open(TRIANGLE)},
        {"video": bytearray(TRIANGLE.read_bytes())},
        {"base64": base64.b64encode(TRIANGLE.read_bytes()).decode()},
        {"base64": base64.encodebytes(TRIANGLE.read_bytes())},
        {"url": "data:video/mp4;base64," + base64.b64encode(TRIANGLE.read_bytes()).decode()},
    ],
    ids=["path", "Path", "file-url", "bytes", "file", "clip", "bytearray", "base64", "base64-lines", "data-url"],
)
def test_a_video_is_named_in_every_usual_way(source):
    ((media,),) = (message.media for message in messages_of(ask({"type": "video", **source}, text())))
    expected = Clip.open(TRIANGLE)
    assert media.kind is Kind.VIDEO
    assert media.tracks == (True, True)
    assert media.clip.require_video().frames == expected.require_video().frames
    assert media.clip.require_audio().samples == expected.require_audio().samples


@pytest.mark.parametrize(
    ("part", "kind", "tracks"),
    [
        ({"type": "video", "video": FRAMES, "fps": 8}, Kind.VIDEO, (True, False)),
        ({"type": "video", "video": torch.from_numpy(FRAMES), "fps": 8.0}, Kind.VIDEO, (True, False)),
        ({"type": "video", "video": FRAMES, "fps": np.float32(8)}, Kind.VIDEO, (True, False)),
        ({"type": "audio", "audio": WAVE, "sampling_rate": 16_000.0}, Kind.AUDIO, (False, True)),
        ({"type": "audio", "audio": WAVE, "sampling_rate": 16_000}, Kind.AUDIO, (False, True)),
        ({"type": "audio", "audio": torch.from_numpy(WAVE), "sampling_rate": 16_000}, Kind.AUDIO, (False, True)),
        ({"type": "audio", "path": str(TRIANGLE)}, Kind.AUDIO, (False, True)),
        ({"type": "image", "image": FRAMES[0]}, Kind.IMAGE, (True, False)),
        ({"type": "image", "image": torch.from_numpy(FRAMES[0])}, Kind.IMAGE, (True, False)),
        ({"type": "image", "image": Image.fromarray(FRAMES[0])}, Kind.IMAGE, (True, False)),
        ({"type": "image", "image": Image.fromarray(FRAMES[0, :, :, 0])}, Kind.IMAGE, (True, False)),
        ({"type": "video", "path": TRIANGLE, "use": "video"}, Kind.VIDEO, (True, False)),
        ({"type": "video", "path": TRIANGLE, "use": "audio"}, Kind.AUDIO, (False, True)),
    ],
)
def test_arrays_tensors_and_pictures_are_media(part, kind, tracks):
    ((media,),) = (message.media for message in messages_of(ask(part, text())))
    assert (media.kind, media.tracks) == (kind, tracks)


def test_a_picture_is_turned_as_it_is_meant_to_be_seen():
    turned, exif = BytesIO(), Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.fromarray(np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)).save(turned, "png", exif=exif)
    ((media,),) = (message.media for message in messages_of(ask({"type": "image", "image": Image.open(turned)})))
    video = media.clip.require_video()
    assert (video.height, video.width) == (4, 2)


def test_an_image_file_is_an_image_and_a_video_is_none(tmp_path):
    Image.fromarray(FRAMES[0]).save(tmp_path / "one.png")
    ((media,),) = (message.media for message in messages_of(ask({"type": "image", "path": tmp_path / "one.png"})))
    assert media.clip.require_video().frames == 1
    with pytest.raises(UnreadableMedia, match=r"content\[0\]: triangle.mp4 is no image: it has"):
        messages_of(ask({"type": "image", "path": TRIANGLE}))


@pytest.mark.parametrize(
    ("parts", "uses"),
    [
        ([{"type": "video", "path": TRIANGLE}], [Use.AUTO]),
        ([{"type": "video", "path": TRIANGLE}, {"type": "audio"}], [Use.BOTH]),
        ([{"type": "video", "path": TRIANGLE}, {"type": "audio", "path": str(TRIANGLE)}], [Use.BOTH]),
        ([{"type": "video", "path": TRIANGLE}, {"type": "audio", "path": KNOCK}], [Use.VIDEO, Use.AUDIO]),
        ([{"type": "audio", "path": KNOCK}, {"type": "video", "path": TRIANGLE}], [Use.AUDIO, Use.VIDEO]),
        (
            [{"type": "video", "path": TRIANGLE, "use": "both"}, {"type": "audio", "path": KNOCK}],
            [Use.BOTH, Use.AUDIO],
        ),
        (
            [*({"type": "video", "path": clip} for clip in (TRIANGLE, KNOCK)), {"type": "audio"}, {"type": "audio"}],
            [Use.BOTH, Use.BOTH],
        ),
    ],
)
def test_sound_beside_a_video_is_its_own_or_another(parts, uses):
    (message,) = messages_of(ask(*parts))
    assert [media.use for media in message.media] == uses


def test_texts_roles_history_and_other_fields_are_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {}}]}
    conversation = [
        {"role": "system", "content": "Be brief."},
        *ask(text("One "), {"type": "image", "image": FRAMES[0]}, text("two")),
        call,
        {"role": "tool", "content": "a star", "name": "look"},
    ]
    messages = messages_of(conversation)
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool"]
    assert messages[1].text == "One two"
    assert messages[0].to_dict(lambda _: []) == conversation[0]
    stand_in = [{"type": "image"}]
    assert messages[1].to_dict(lambda _: stand_in)["content"] == [text("One "), *stand_in, text("two")]
    assert messages[2].to_dict(lambda _: []) == {**call, "content": ""}
    assert messages_of(messages) == messages


# --- what is wrong, and where


def gif() -> Image.Image:
    frames = [Image.new("RGB", (4, 4), (red, 0, 0)) for red in (0, 200)]
    file = BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return Image.open(file)


def cut_png() -> Image.Image:
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return Image.open(BytesIO(file.getvalue()[:1000]))


NO_SERVER = "http://127.0.0.1:9/clip.mp4"


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("What?", FastAVError, "messages must be a list of messages, got str"),
        ([], FastAVError, "there are no messages"),
        (["What?"], FastAVError, r"messages\[0\] must be an object"),
        ([{"content": "What?"}], FastAVError, r"messages\[0\] has no role"),
        ([{"role": "usr", "content": "What?"}], UnknownName, r"messages\[0\]: no role is called 'usr'"),
        ([{"role": "user"}], FastAVError, r"messages\[0\] has no content"),
        ([{"role": "user", "content": 3}], FastAVError, r"messages\[0\]\.content must be text or a list"),
        ([{"role": "user", "content": " "}], FastAVError, "the last message is empty"),
        ([{"role": "user", "content": "\udcff"}], FastAVError, r"messages\[0\] is not text"),
        ([*ask(text()), {"role": "assistant", "content": "A"}], FastAVError, "of the role 'assistant'"),
        (ask("What?"), FastAVError, r"messages\[0\]\.content\[0\] must be an object"),
        (ask(text(), {"text": "?"}), FastAVError, r"messages\[0\]\.content\[1\] has no type"),
        (ask({"type": "text"}), FastAVError, r"messages\[0\]\.content\[0\] has no text"),
        (ask({"type": "vidio", "path": "a"}), UnknownName, r"content\[0\]: no type of part is called 'vidio'"),
        (ask(text(), {"type": "video"}), MediaError, r"messages\[0\]\.content\[1\]: the part names no file"),
        (ask({"type": "audio"}), MediaError, r"content\[0\]: the part names no file"),
        (ask(text(), {"type": "video", "path": "gone.mp4"}), UnreadableMedia, r"content\[1\]: no such file: gone.mp4"),
        (ask({"type": "video", "video": FRAMES}), MediaError, r"content\[0\]: an array of video needs its fps"),
        (ask({"type": "audio", "audio": WAVE}), MediaError, r"content\[0\]: an array of audio needs its sampling_rate"),
        (ask({"type": "image", "image": FRAMES}), UnreadableMedia, r"content\[0\]: an image must be uint8"),
        (ask({"type": "image", "image": WAVE}), UnreadableMedia, r"content\[0\]: an image must be uint8"),
        (ask({"type": "video", "video": FRAMES / 255, "fps": 8}), UnreadableMedia, r"content\[0\]: frames must be"),
        (ask({"type": "video", "video": {"a": 1}}), MediaError, r"content\[0\]: a part cannot show a dict"),
        (ask({"type": "video", "base64": "?"}), UnreadableMedia, r"content\[0\]: "),
        (ask({"type": "video", "path": TRIANGLE, "use": "picture"}), UnknownName, r"content\[0\]: no use of a clip"),
        (ask({"type": "video", "video": FRAMES, "fps": 8}, {"type": "audio"}), MissingTrack, r"content\[0\]: "),
        (
            ask({"type": "video", "path": TRIANGLE, "url": "a"}),
            FastAVError,
            r"content\[0\] names its medium twice, under",
        ),
        (ask({"type": "audio", "path": KNOCK, "use": "video"}), FastAVError, r"content\[0\] .* only a video has a use"),
        (
            ask({"type": "video", "path": TRIANGLE, "use": "video"}, {"type": "audio"}),
            FastAVError,
            r"content\[1\] is the sound of messages\[0\]\.content\[0\], whose use is 'video'",
        ),
        (
            ask({"type": "video", "video": FRAMES, "fps": "8"}),
            MediaError,
            r"content\[0\]: fps must be a number, got '8'",
        ),
        (
            ask({"type": "video", "video": FRAMES, "fps": float("inf")}),
            UnreadableMedia,
            "fps must be positive and finite",
        ),
        (
            ask({"type": "audio", "audio": WAVE, "sampling_rate": "8000"}),
            MediaError,
            r"content\[0\]: sampling_rate must be a",
        ),
        (
            ask({"type": "audio", "audio": WAVE, "sampling_rate": 0.5}),
            MediaError,
            "sampling_rate must be a whole number",
        ),
        (ask({"type": "video", "video": [[1], [2, 3]], "fps": 8}), UnreadableMedia, r"content\[0\]: this is no array"),
        (ask({"type": "video", "base64": 5}), UnreadableMedia, r"content\[0\]: this is no base64"),
        (ask({"type": "video", "base64": "data:video/mp4;base64,AAAA"}), UnreadableMedia, "goes under .url."),
        (ask({"type": "image", "image": Image.new("I;16", (4, 4))}), UnreadableMedia, r"content\[0\]: .* mode 'I;16'"),
        (ask({"type": "image", "image": gif()}), UnreadableMedia, r"content\[0\]: this is no image: it has 2 frames"),
        (ask({"type": "image", "image": cut_png()}), UnreadableMedia, r"content\[0\]: the image cannot be read"),
        (ask({"type": "video", "path": TRIANGLE, "fps": 1}), FastAVError, r"content\[0\] has fps, which would have no"),
        (ask({"type": "image", "image": FRAMES[0], "max_pixels": 9}), FastAVError, r"content\[0\] has max_pixels"),
        (ask({"type": "audio", "audio": WAVE * np.nan, "sampling_rate": 8000}), UnreadableMedia, "must be finite"),
        (ask({"type": "video", "url": NO_SERVER}), UnreadableMedia, r"content\[0\]: .*127.0.0.1:9"),
    ],
)
def test_an_error_names_the_place(messages, error, message):
    with pytest.raises(error, match=message):
        messages_of(messages)


class _Endless(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(10**9))
        self.end_headers()
        self.wfile.write(bytes(10_000))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endless)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/long.mp4"
    server.shutdown()
    server.server_close()


def test_a_url_that_is_too_large_and_one_that_is_forbidden_are_named(address):
    part = {"type": "video", "url": address}
    for policy, message in (
        (MediaPolicy(max_bytes=1000), "MB|bytes|large"),
        (MediaPolicy(urls=False), "not allowed|URL"),
    ):
        with pytest.raises(UnreadableMedia, match=rf"messages\[0\]\.content\[1\]: .*({message})"):
            Request(messages=ask(text(), part), policy=policy)


# --- requests and pipelines


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return fastav.pipeline(device="cpu")


def test_messages_about_one_clip_are_the_clip_and_the_question(pipe):
    question = "What color is the triangle?"
    expected = pipe(TRIANGLE, question, max_new_tokens=4)
    for messages in (
        ask({"type": "video", "path": TRIANGLE}, text(question)),
        ask(text(question), {"type": "video", "path": TRIANGLE}),
        (Message(role="user", content=(*Request(clip=TRIANGLE, question=question).media, question)),),
    ):
        found = pipe(messages, max_new_tokens=4)
        assert (found.token_ids, found.prompt_tokens) == (expected.token_ids, expected.prompt_tokens)
    request = Request(clip=TRIANGLE, question=question)
    assert (request.question, request.use, request.clip.name) == (question, Use.AUTO, "triangle.mp4")
    two = pipe([ask({"type": "video", "path": clip}, text(question)) for clip in (TRIANGLE, KNOCK)], max_new_tokens=4)
    assert two[0].token_ids == expected.token_ids
    assert len(two) == 2


def test_questions_beside_messages_are_refused(pipe):
    messages = ask({"type": "video", "path": TRIANGLE}, text())
    with pytest.raises(FastAVError, match="messages have their own question"):
        pipe(messages, "What?")
    with pytest.raises(FastAVError, match="messages, or a clip and a question, not both"):
        Request(messages=messages, question="What?")
    with pytest.raises(FastAVError, match="a Request has its own use and tools"):
        pipe(Request(messages=messages), use="video")
    with pytest.raises(FastAVError, match="the request has 2 clips, not one"):
        _ = Request(messages=ask(*({"type": "video", "path": clip} for clip in (TRIANGLE, KNOCK)))).clip


@pytest.mark.filterwarnings("ignore:tiny does not know")
@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        (
            ask(*({"type": "video", "path": clip} for clip in (TRIANGLE, KNOCK))),
            MediaError,
            r"messages\[0\]\.content\[1\]: knock.mp4: this model takes one clip per prompt",
        ),
        (ask({"type": "image", "image": FRAMES[0]}, text()), MediaError, r"content\[0\]: image: .*no images"),
        (ask(text("<video>")) + ask({"type": "video", "path": KNOCK}), MediaError, "stands for a clip"),
    ],
)
def test_what_a_family_of_one_clip_cannot_take_is_refused_with_the_reason(pipe, messages, error, message):
    with pytest.raises(error, match=message):
        pipe(messages)


def test_tools_are_refused_by_a_template_that_takes_none(pipe):
    with pytest.raises(FastAVError, match="chat template takes no tools"):
        pipe(ask({"type": "video", "path": TRIANGLE}, text()), tools=[{"name": "look"}])


def test_a_sound_beside_a_video_replaces_its_own_in_a_family_of_one_clip(pipe):
    adapter, processor = MODELS["tiny"](), pipe.engine.processor
    mixed = Request(messages=ask({"type": "video", "path": TRIANGLE}, {"type": "audio", "path": KNOCK}, text()))
    clip = replace(Clip.open(TRIANGLE), audio=Clip.open(KNOCK).audio)
    expected = adapter.prepare(processor, [Request(clip=clip, question="What moves?")])
    found = adapter.prepare(processor, [mixed])
    for name, value in expected.inputs.items():
        assert torch.equal(found.inputs[name], value), name


def test_history_and_text_alone_reach_the_prompt_of_a_family_of_one_clip(pipe):
    history = [*ask({"type": "video", "path": TRIANGLE}, text("What moves?")), {"role": "assistant", "content": "red"}]
    later = pipe([*history, {"role": "user", "content": "What color?"}], max_new_tokens=2)
    first = pipe(history[:1], max_new_tokens=2)
    assert later.prompt_tokens["video"] == first.prompt_tokens["video"]
    assert later.prompt_tokens["text"] > first.prompt_tokens["text"]
    assert set(pipe(ask(text()), max_new_tokens=2).prompt_tokens) == {"text"}
