"""Our models in transformers' own pipelines, and exported."""

from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.utils import is_librosa_available

from fastav.errors import MediaError, UnreadableMedia
from support.native import FAMILIES

CLIPS = [str(files("fastav") / "assets" / "clips" / name) for name in ("triangle.mp4", "knock.mp4")]
NEEDS_LIBROSA = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)
TASKS = ("image-text-to-text", "any-to-any")


def talk(clip: str = CLIPS[0], kind: str = "video") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, "path": clip}, {"type": "text", "text": "What is heard?"}]}]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def saved(request: Any, tmp_path_factory: Any) -> Any:
    """A save of the tiny checkpoint, which the Auto classes know by the model type that we write."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = family.model_class.from_pretrained(family.tiny, dtype=torch.float32)
    model.save_pretrained(folder)
    loaded = family.processor()
    loaded.save_pretrained(folder)
    return folder, model, loaded


def answered(pipe: Any, talks: Any, **options: Any) -> list[list[int]]:
    many = pipe(text=talks, generate_kwargs={"do_sample": False}, max_new_tokens=3, return_tensors=True, **options)
    return [answer[0]["generated_token_ids"][-3:].tolist() for answer in many]


@pytest.mark.parametrize("task", TASKS)
def test_a_chat_with_a_clip_is_answered(saved: Any, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model, processor = saved
    if task == "any-to-any":  # before 5.24 it wants librosa, whatever the model, which nothing of ours uses
        if NEEDS_LIBROSA and not is_librosa_available():
            with pytest.raises(ImportError, match="librosa"):
                transformers.pipeline(task, model=str(folder))
        monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    pipe = transformers.pipeline(task, model=str(folder), dtype=torch.float32)
    talks = [talk(CLIPS[0]), [{"role": "user", "content": "Hello!"}], talk(CLIPS[1])]
    wanted = []
    for messages in talks:
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
        wanted.append(model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, -3:].tolist())
    assert answered(pipe, talks) == wanted
    answer = pipe(text=talk(), max_new_tokens=3, return_full_text=False, generate_kwargs={"do_sample": False})
    assert answer[0]["generated_text"] == processor.tokenizer.decode(wanted[0], skip_special_tokens=True)
    for wrong, error in ((talk("missing.mp4"), UnreadableMedia), (talk(kind="image"), MediaError)):
        with pytest.raises(error):
            pipe(text=wrong)


def test_a_batch_that_transformers_put_together_is_right_or_an_error(saved: Any) -> None:
    pipe = transformers.pipeline("image-text-to-text", model=str(saved[0]), dtype=torch.float32)
    talks = [talk(CLIPS[0]), talk(CLIPS[1]), talk(CLIPS[0])]
    wanted = answered(pipe, talks, load_audio_from_video=False)
    options = {"load_audio_from_video": False, "batch_size": 3}
    if type(pipe.model).__name__.startswith("VideoLlama2"):
        assert answered(pipe, talks, **options) == wanted
    else:  # it keeps the first frame of each clip, and takes axes of positions for rows
        with pytest.raises(MediaError, match=r"placeholders of id|position_ids must be"):
            answered(pipe, talks, **options)


def test_paths_are_no_arrays_and_tensors_are(saved: Any) -> None:
    processor = saved[2]
    text = processor.prompt("Why?", video=True)
    for path in (CLIPS[0], [CLIPS[0]]):
        with pytest.raises(MediaError, match=r"videos must be arrays, got the path .*triangle\.mp4"):
            processor(text, videos=path)
        with pytest.raises(MediaError, match=r"audio must be arrays, got the path .*triangle\.mp4"):
            processor(text, videos=np.zeros((8, 40, 60, 3), np.uint8), audio=path)
    frames = np.random.default_rng(0).integers(0, 256, (8, 40, 60, 3), dtype=np.uint8)
    ours, wanted = processor(text, videos=torch.from_numpy(frames)), processor(text, videos=frames)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@torch.no_grad()
@pytest.mark.parametrize("shown", ["ids", "text", "clip"])
def test_a_prefill_is_exported(saved: Any, shown: str) -> None:
    _, model, processor = saved
    clip = {"videos": [np.zeros((8, 40, 60, 3), np.uint8)], "audio": [np.zeros(16_000, np.float32)]}
    inputs = dict(processor(processor.prompt("Why?", video=shown == "clip"), **(clip if shown == "clip" else {})))
    if shown == "ids":
        inputs = {"input_ids": inputs["input_ids"]}
    inputs["use_cache"] = False
    if "video_grid_thw" in inputs:  # Qwen2.5-VL's tower reads the sizes of videos on the host
        with pytest.raises(RuntimeError, match="data-dependent"):
            torch.export.export(model, (), inputs, strict=False)
        return
    exported = torch.export.export(model, (), inputs, strict=False).module()
    assert torch.allclose(exported(**inputs).logits, model(**inputs).logits, atol=1e-5)
