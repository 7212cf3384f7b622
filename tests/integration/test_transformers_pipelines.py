"""Pruning inside transformers' own pipelines: the tokens are those of `generate` under the same plan."""

from importlib.resources import files

import pytest
import torch
import transformers

import fastav
from support import stock
from support.families import qwen2_5_omni

CLIP = str(files("fastav") / "assets" / "clips" / "triangle.mp4")


def messages():
    parts = [{"type": "video", "path": CLIP}, {"type": "audio", "path": CLIP}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": parts}]


def tokens_of(ask):
    generate = {"max_new_tokens": 8, "do_sample": False}
    options = {"processor_kwargs": {"fps": 2}, "generate_kwargs": generate, "return_tensors": True}
    (output,) = ask(text=messages(), **options)
    return output["generated_token_ids"]


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_a_pipeline_of_transformers_prunes_as_generate_does(task, monkeypatch):
    stock.decode_with_pyav(monkeypatch)
    # before 5.24 `any-to-any` wants librosa, which it does not use here
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    model, processor = qwen2_5_omni.build()
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages(), **options, processor_kwargs={"fps": 2})
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with fastav.prune(model, "fastav"):
        pruned = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not torch.equal(plain, pruned)

    ask = transformers.pipeline(task, model=model, processor=processor)
    with fastav.prune(ask.model, "fastav") as pruning:
        assert torch.equal(tokens_of(ask), pruned[0])
    assert sum(pruning.tokens()[0][-1].values()) < inputs["input_ids"].shape[1]
    assert torch.equal(tokens_of(ask), plain[0])
