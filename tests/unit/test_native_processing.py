"""The processors of our own families, apart from what the originals' arrays show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from fastav.errors import CheckpointError, MediaError
from fastav.models._native_processing import QWEN2_TEMPLATE
from support.native import VIDEO_SALMONN2, VIDEO_SALMONN2_PLUS, VIDEOLLAMA2, Family, each_family

pytestmark = each_family
RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (8, 56, 84, 3), dtype=np.uint8)
SOUND = RANDOM.uniform(-0.5, 0.5, 70_000).astype(np.float32)
ANSWER = {VIDEO_SALMONN2_PLUS.name: "<|im_start|>as"}  # three tokens of the answer's header, which are all of Qwen's
COUNTS = {VIDEOLLAMA2.name: (16, 1496), VIDEO_SALMONN2.name: (3 * 20, 3 * 20), VIDEO_SALMONN2_PLUS.name: (4 * 6, 60)}
NEWLINES = {VIDEOLLAMA2.name: "\n", VIDEO_SALMONN2.name: "\n\n", VIDEO_SALMONN2_PLUS.name: "\n"}
PADDED = {VIDEOLLAMA2.name: 6, VIDEO_SALMONN2.name: 9, VIDEO_SALMONN2_PLUS.name: 9}  # "Hello there" against "Hi"
ENTRIES = {VIDEOLLAMA2.name: 156, VIDEO_SALMONN2.name: 259, VIDEO_SALMONN2_PLUS.name: 264}  # of the tokenizers
LENGTH = {"video_salmonn2": "video_seconds", "video_salmonn2_plus": "seconds"}  # how long a video lasts


@pytest.fixture(scope="module")
def processor(family: Family) -> Any:
    return family.processor()


def test_saving_and_loading_changes_nothing(family: Family, processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)  # no config.json there
    assert type(again) is family.processor_class
    assert again.media == processor.media
    prompt = processor.prompt("What moves?", video=True)
    assert again.prompt("What moves?", video=True) == prompt
    seconds = {LENGTH[family.name]: 3.3} if family.name in LENGTH else {}
    ours, other = (p(prompt, videos=FRAMES, audio=SOUND, **seconds) for p in (processor, again))
    assert all(torch.equal(ours[name], other[name]) for name in ours)


@pytest.mark.parametrize("question", ["", "What is <video>?", "<audio>", "\nWhy?", "<video><video>\n<audio>"])
def test_places_in_a_question_are_plain_text(family: Family, processor: Any, question: str) -> None:
    frames, scheme, (video, audio) = (
        FRAMES[:3] if family is VIDEO_SALMONN2 else FRAMES,
        processor.media,
        COUNTS[family.name],
    )
    for sound in (
        (SOUND,) if family is VIDEO_SALMONN2 else (SOUND, None)
    ):  # silent frames there have their times between
        ids = processor(processor.prompt(question, video=True), videos=[frames], audio=[sound])["input_ids"][0]
        assert int((ids == scheme.video_token_id).sum()) == video
        assert int((ids == scheme.audio_token_id).sum()) == (0 if sound is None else audio)
        clip = (ids == scheme.video_token_id) | (ids == scheme.audio_token_id)
        if family is VIDEO_SALMONN2_PLUS:
            clip = ids == scheme.vision_end_token_id
        after = processor.tokenizer.decode(ids[int(clip.nonzero()[-1]) + 1 :])
        answer = ANSWER.get(family.name, "<|im_start|>assistant\n")
        assert after == f"{NEWLINES[family.name]}{question}<|im_end|>\n{answer}"


def test_text_alone_needs_no_clip(family: Family, processor: Any) -> None:
    inputs = processor(processor.prompt("Is <video> a tag?", video=False))
    placed = {"position_ids"} if family is VIDEO_SALMONN2_PLUS else set()
    assert set(inputs) == {"input_ids", "attention_mask"} | placed
    placeholders = [processor.scheme[name] for name in family.config_class.placeholder_names]
    assert not torch.isin(inputs["input_ids"], torch.tensor(placeholders)).any()
    if not placed:  # whose placeholders have the largest ids
        least = processor.media.video_token_id if family is VIDEOLLAMA2 else processor.media.blank_token_id
        assert not (inputs["input_ids"] >= least).any()
    if placed:
        assert (inputs["position_ids"][:, 0] == torch.arange(inputs["input_ids"].shape[1])).all()


def test_prompts_are_padded_at_the_left(family: Family, processor: Any) -> None:
    prompts = [processor.prompt(q, video=False) for q in ("Hi", "Hello there")]
    inputs, alone = processor(prompts), processor(prompts[0])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padded = int((mask[0] == 0).sum())
    assert padded == ids.shape[1] - alone["input_ids"].shape[1] == PADDED[family.name]
    assert not mask[0, :padded].any()
    assert mask[0, padded:].all()
    assert (ids[0, :padded] == processor.tokenizer.pad_token_id).all()
    assert torch.equal(ids[0, padded:], alone["input_ids"][0])
    assert mask[1].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"videos": FRAMES.astype(np.float32)}, "uint8 frames"),
        ({"videos": [FRAMES[0]]}, "uint8 frames"),
        ({"videos": [FRAMES[:0]]}, "uint8 frames"),
        ({"videos": [FRAMES, FRAMES]}, r"one entry per prompt \(1\), got 2"),
        ({"videos": FRAMES, "audio": [SOUND, SOUND]}, r"one entry per prompt \(1\), got 2"),
        ({"videos": FRAMES, "audio": [np.stack([SOUND, SOUND])]}, "mono float samples"),
        ({"videos": FRAMES, "audio": [np.zeros(9, np.int16)]}, "mono float samples"),
        ({"videos": FRAMES, "audio": SOUND, "sampling_rate": 44_100}, "must be at 16000 Hz, got 44100"),
        ({"audio": SOUND}, "no <audio> for its clip"),
        ({"videos": FRAMES, "return_tensors": "np"}, "PyTorch tensors only"),
        ({"videos": FRAMES, "padding": False}, "PyTorch tensors only"),
    ],
)
def test_media_that_do_not_fit_are_an_error(
    family: Family, processor: Any, arguments: dict[str, Any], message: str
) -> None:
    if family is VIDEO_SALMONN2_PLUS and "videos" not in arguments:
        message = "only along with a picture"
    with pytest.raises(MediaError, match=message):
        processor(processor.prompt("?", video=True), **arguments)
    alone = {name: value for name, value in arguments.items() if name != "videos"}
    any_rate = family is VIDEOLLAMA2 and "sampling_rate" in alone  # a file's own, which it resamples
    if "audio" in alone and "videos" in arguments and "audio" in processor.places and not any_rate:
        with pytest.raises(MediaError, match=message):
            processor(processor.prompt("?", video=False, audio=True), **alone)


def test_a_prompt_without_place_for_its_clip_is_an_error(family: Family, processor: Any) -> None:
    with pytest.raises(MediaError, match="no <video> for its clip"):
        processor(processor.prompt("?", video=False).replace("<video>", ""), videos=FRAMES)


def test_tokenizer_that_does_not_fit_the_placeholders_ids_is_an_error(family: Family, processor: Any) -> None:
    entries = ENTRIES[family.name]
    if family is VIDEO_SALMONN2_PLUS:
        scheme, message = None, f"the tokenizer has {entries} entries, but placeholders go up to 151656"
    else:
        scheme = processor.scheme | {min(family.config_class.placeholder_names, key=processor.scheme.get): 10}
        message = f"the tokenizer has {entries} entries, but ids from 10 on must be free"
    with pytest.raises(CheckpointError, match=message):
        family.processor_class(processor.tokenizer, scheme=scheme)


def test_messages_may_have_parts(family: Family, processor: Any) -> None:
    def render(*kinds: str) -> str:
        parts = [{"type": kind} for kind in kinds] + [{"type": "text", "text": "Why?"}]
        return processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)

    shown = processor.prompt("Why?", video=True)
    assert render("video", "audio") == render("audio", "video") == render("video") == shown
    assert render() == processor.prompt("Why?", video=False)
    with pytest.raises(MediaError, match="type image"):
        render("image")
    if "audio" in processor.places:
        assert render("audio") == processor.prompt("Why?", video=False, audio=True)
    else:
        with pytest.raises(MediaError, match="only along with a picture"):
            render("audio")


def test_conversations_may_be_a_batch(family: Family, processor: Any) -> None:
    talks = [[{"role": "user", "content": text}] for text in ("Hi", "Bye")]
    rendered = processor.apply_chat_template(talks, add_generation_prompt=True)
    assert rendered == [processor.prompt(text, video=False) for text in ("Hi", "Bye")]


def test_template_is_the_originals(family: Family, processor: Any) -> None:
    """VideoLLaMA2's is its tokenizer's, if that has one; the others' is used whatever the tokenizer has."""
    tokenizer = AutoTokenizer.from_pretrained(family.tiny)
    own = tokenizer.chat_template if family is VIDEOLLAMA2 else "{{ 'You are somebody else.' }}"
    for template in (own, None):
        tokenizer.chat_template = template
        other = family.processor_class(tokenizer, scheme=processor.scheme)
        assert other.chat_template == (own if family is VIDEOLLAMA2 and template else QWEN2_TEMPLATE)
        assert other.prompt("Why?", video=True) == processor.prompt("Why?", video=True)
