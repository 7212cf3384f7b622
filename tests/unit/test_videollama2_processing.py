"""VideoLLaMA2's processor, apart from what the original's arrays show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from fastav.errors import CheckpointError, MediaError
from fastav.models._native_processing import QWEN2_TEMPLATE
from fastav.models.videollama2 import VideoLlama2Processor, clip_bounds, file_features, soundtrack_features

TINY = Path(__file__).parents[1] / "reference" / "videollama2"
RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (8, 40, 60, 3), dtype=np.uint8)
SOUND = RANDOM.uniform(-0.5, 0.5, 70_000).astype(np.float32)


@pytest.fixture(scope="module")
def processor() -> VideoLlama2Processor:
    return VideoLlama2Processor.from_pretrained(TINY)


def test_saving_and_loading_changes_nothing(processor: VideoLlama2Processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)  # no config.json there
    assert type(again) is VideoLlama2Processor
    assert again.media == processor.media
    prompt = processor.prompt("What moves?", video=True)
    assert again.prompt("What moves?", video=True) == prompt
    ours, other = (p(prompt, videos=FRAMES, audio=SOUND) for p in (processor, again))
    assert all(torch.equal(ours[name], other[name]) for name in ours)


@pytest.mark.parametrize("question", ["", "What is <video>?", "<audio>", "<video><video>\n<audio>"])
def test_placeholders_in_a_question_are_plain_text(processor: VideoLlama2Processor, question: str) -> None:
    inputs = processor(processor.prompt(question, video=True), videos=FRAMES)
    ids = inputs["input_ids"][0]
    run = ids == processor.media.video_token_id
    assert int(run.sum()) == processor.media.video_tokens(8)
    after = processor.tokenizer.decode(ids[int(run.nonzero()[-1]) + 1 :])
    assert after == f"\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_text_alone_needs_no_placeholder(processor: VideoLlama2Processor) -> None:
    inputs = processor(processor.prompt("Is <video> a tag?", video=False))
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert not (inputs["input_ids"] >= processor.media.video_token_id).any()


def test_prompts_are_padded_at_the_left(processor: VideoLlama2Processor) -> None:
    inputs = processor([processor.prompt(q, video=False) for q in ("Hi", "Hello there")])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padded = int((mask[0] == 0).sum())
    assert padded > 0
    assert not mask[0, :padded].any()
    assert mask[0, padded:].all()
    assert (ids[0, :padded] == processor.tokenizer.pad_token_id).all()
    assert mask[1].all()


def test_sound_may_come_cut_or_whole(processor: VideoLlama2Processor) -> None:
    prompt = processor.prompt("?", video=True)
    pieces = [SOUND[start:end] for start, end in clip_bounds(len(SOUND))]
    whole, cut = (processor(prompt, videos=FRAMES, audio=audio) for audio in (SOUND, [pieces]))
    assert torch.equal(whole["input_features"], cut["input_features"])
    assert torch.equal(whole["feature_attention_mask"], cut["feature_attention_mask"])


def test_scheme_of_a_sound_is_a_soundtracks_only_with_a_video(processor: VideoLlama2Processor) -> None:
    prompt = processor.prompt("?", video=False, audio=True)
    file, track = (processor(prompt, audio=SOUND, audio_from_video=flag) for flag in (None, True))
    assert torch.equal(file["input_features"][0], file_features(SOUND, 16_000, processor.media)[0])
    assert torch.equal(track["input_features"][0], soundtrack_features(SOUND, processor.media)[0])
    assert not torch.equal(file["input_features"], track["input_features"])


def test_only_the_first_thirty_seconds_of_a_file_are_heard(processor: VideoLlama2Processor) -> None:
    sound = RANDOM.normal(size=31 * 8000)
    features, heard = file_features(sound, 8000, processor.media)
    assert torch.equal(features, file_features(sound[: 30 * 8000], 8000, processor.media)[0])
    assert heard.all()


@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.0, 5.0, 18.0, 60.0])
def test_a_soundtrack_is_sixteen_seconds_at_most(seconds: float) -> None:
    samples = int(seconds * 16_000)
    _, heard = soundtrack_features(np.ones(samples, np.float32))
    assert int(heard.sum()) == 100 * min(seconds, 2) * 8


def test_no_sound_at_all_is_silence() -> None:
    for features, heard in (
        soundtrack_features(np.zeros(0, np.float32)),
        soundtrack_features([]),
        file_features(np.zeros(0), 44_100),
    ):
        assert features.shape == (2998, 128)
        assert torch.equal(features, torch.full_like(features, -15.9375))  # log of float32's epsilon, in bfloat16
        assert not heard.any()


def test_missing_frames_are_black(processor: VideoLlama2Processor) -> None:
    inputs = processor(processor.prompt("?", video=True), videos=[FRAMES[:3]])
    pixels = inputs["pixel_values_videos"]
    assert pixels.shape == (1, 8, 3, 75, 75)
    assert (pixels[0, 3:] == -1).all()
    assert not (pixels[0, 2] == -1).all()


def test_at_most_thirty_two_frames_are_kept(processor: VideoLlama2Processor) -> None:
    many = np.repeat(FRAMES, 5, axis=0)
    inputs = processor(processor.prompt("?", video=True), videos=many)
    assert inputs["pixel_values_videos"].shape[1] == 32
    assert int((inputs["input_ids"] == processor.media.video_token_id).sum()) == processor.media.video_tokens(32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"videos": FRAMES.astype(np.float32)}, "uint8 frames"),
        ({"videos": [FRAMES[0]]}, "uint8 frames"),
        ({"videos": [FRAMES[:0]]}, "uint8 frames"),
        ({"videos": [FRAMES, FRAMES]}, r"one entry per prompt \(1\), got 2"),
        ({"audio": [SOUND, SOUND]}, r"one entry per prompt \(1\), got 2"),
        ({"audio": [np.stack([SOUND, SOUND])]}, "mono float samples"),
        ({"audio": [np.zeros(9, np.int16)]}, "mono float samples"),
        ({"videos": FRAMES, "audio": SOUND, "sampling_rate": 44_100}, "must be at 16000 Hz, got 44100"),
        ({"audio": SOUND}, "no <audio> for its clip"),
        ({"videos": FRAMES, "return_tensors": "np"}, "PyTorch tensors only"),
        ({"videos": FRAMES, "padding": False}, "PyTorch tensors only"),
    ],
)
def test_media_that_do_not_fit_are_an_error(
    processor: VideoLlama2Processor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(MediaError, match=message):
        processor(processor.prompt("?", video=True), **arguments)


def test_videos_of_a_batch_have_as_many_frames(processor: VideoLlama2Processor) -> None:
    with pytest.raises(MediaError, match="as many frames each"):
        processor([processor.prompt("?", video=True)] * 2, videos=[FRAMES, np.repeat(FRAMES, 2, axis=0)])


def test_tokenizer_that_uses_the_placeholders_ids_is_an_error(processor: VideoLlama2Processor) -> None:
    scheme = processor.scheme | {"video_token_id": 10}
    with pytest.raises(CheckpointError, match="the tokenizer has 156 entries, but ids from 10 on"):
        VideoLlama2Processor(processor.tokenizer, scheme=scheme)


def test_messages_may_have_parts(processor: VideoLlama2Processor) -> None:
    def render(*kinds: str) -> str:
        parts = [{"type": kind} for kind in kinds] + [{"type": "text", "text": "Why?"}]
        return processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)

    assert render("video", "audio") == render("audio", "video") == processor.prompt("Why?", video=True)
    assert render("audio") == processor.prompt("Why?", video=False, audio=True)
    assert render() == processor.prompt("Why?", video=False)
    with pytest.raises(MediaError, match="type image"):
        render("image")


def test_conversations_may_be_a_batch(processor: VideoLlama2Processor) -> None:
    talks = [[{"role": "user", "content": text}] for text in ("Hi", "Bye")]
    rendered = processor.apply_chat_template(talks, add_generation_prompt=True)
    assert rendered == [processor.prompt(text, video=False) for text in ("Hi", "Bye")]


def test_default_template_is_the_tokenizers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    wanted = VideoLlama2Processor(tokenizer).prompt("Why?", video=True)
    tokenizer.chat_template = None
    assert VideoLlama2Processor(tokenizer).chat_template == QWEN2_TEMPLATE
    assert VideoLlama2Processor(tokenizer).prompt("Why?", video=True) == wanted
