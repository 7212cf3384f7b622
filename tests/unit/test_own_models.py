"""Our models behave as transformers' own do: saves, outputs, embeddings, places and media."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from fastav.cache_argument import as_argument, of_output
from fastav.errors import CheckpointError, MediaError
from fastav.models.video_salmonn2 import VideoSalmonn2Model
from support.native import FAMILIES, assert_same_weights, attention

RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (2, 8, 40, 60, 3), dtype=np.uint8)
SOUND = RANDOM.uniform(-0.5, 0.5, 16_000).astype(np.float32)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: Any) -> tuple[Any, Any, Any]:
    """A model, the class of its base, and its processor."""
    family = FAMILIES[request.param]
    return family.model_class.from_pretrained(family.tiny, dtype=torch.float32), family.base_class, family.processor()


def inputs_of(processor: Any, *, audio: bool = False) -> dict[str, Any]:
    """Two prompts about clips of their own, padded."""
    texts = [processor.prompt(text, video=True) for text in ("Why?", "What is it that moves?")]
    return dict(processor(texts, videos=list(FRAMES), audio=[SOUND, None] if audio else None))


def media_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


def test_saves_load_into_the_whole_model_and_its_base(family: Any, tmp_path: Path) -> None:
    model, base, _ = family
    model.save_pretrained(tmp_path / "whole")
    assert_same_weights(type(model).from_pretrained(tmp_path / "whole"), model)
    ours = base.from_pretrained(tmp_path / "whole")
    if hasattr(model, "visual"):
        assert set(model.state_dict()) - set(ours.state_dict()) == {"lm_head.weight"}
    else:
        assert_same_weights(ours, model.model)
    ours.save_pretrained(tmp_path / "base")
    assert_same_weights(base.from_pretrained(tmp_path / "base"), ours)
    assert_same_weights(AutoModel.from_pretrained(tmp_path / "base"), ours)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):  # a head that was never there is not drawn by chance
        type(model).from_pretrained(tmp_path / "base")


def test_weights_in_memory_load_without_a_checkpoint(family: Any) -> None:
    model, base, _ = family
    whole = model.state_dict()
    assert_same_weights(type(model).from_pretrained(None, config=model.config, state_dict=whole), model)
    if base is not VideoSalmonn2Model:  # whose whole model holds encoders beside it
        ours = base.from_pretrained(None, config=model.config, state_dict=whole)
        prefix = "" if hasattr(model, "visual") else "model."
        assert {prefix + name for name in ours.state_dict()} == set(whole) - {"lm_head.weight"}
        assert all(torch.equal(value, whole[prefix + name]) for name, value in ours.state_dict().items())
    own = base(model.config)
    weights = own.state_dict()
    assert_same_weights(base.from_pretrained(None, config=model.config, state_dict=weights), own)
    lost = next(name for name in weights if name.endswith("embed_tokens.weight"))
    del weights[lost]
    with pytest.raises(CheckpointError, match=f"lacks 1 key: {lost}"):
        base.from_pretrained(None, config=model.config, state_dict=weights)


def test_a_save_has_the_originals_names(family: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    model, _, _ = family
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())


@torch.no_grad()
def test_tuples_hold_what_outputs_do(family: Any) -> None:
    model, _, processor = family
    inputs = inputs_of(processor)
    wanted = model(**inputs)
    assert torch.equal(model(**inputs, return_dict=False)[0], wanted.logits)
    parts = (model.config, model.config.get_text_config(decoder=True))
    videos = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw") if name in inputs}
    for part in parts:
        part.return_dict = False
    try:
        ours, features = model(**inputs), model.get_video_features(**videos)
        generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    finally:
        for part in parts:
            part.return_dict = True
    assert isinstance(ours, tuple)
    assert isinstance(features, tuple)
    assert torch.equal(ours[0], wanted.logits)
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=2, do_sample=False))


@torch.no_grad()
def test_features_are_outputs_as_in_transformers(family: Any) -> None:
    model, _, processor = family
    inputs = inputs_of(processor, audio=True)
    sizes = {name: inputs[name] for name in ("video_grid_thw",) if name in inputs}
    seen = model.get_video_features(inputs["pixel_values_videos"], **sizes)
    heard = model.get_audio_features(inputs["input_features"])
    hidden = model.config.get_text_config(decoder=True).hidden_size
    for output in (seen, heard):
        assert {"last_hidden_state", "pooler_output"} <= set(output.keys())
        assert all(tokens.shape[-1] == hidden for tokens in output.pooler_output)
    scheme = processor.media
    tokens = sum(len(video.reshape(-1, hidden)) for video in seen.pooler_output)
    assert tokens == int((inputs["input_ids"] == scheme.video_token_id).sum())


@torch.no_grad()
def test_encoders_give_their_states_and_maps(family: Any) -> None:
    model, _, processor = family
    inputs = inputs_of(processor, audio=True)
    seen = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw") if name in inputs}
    with attention(model, "eager"):
        for features, given in (
            (model.get_video_features, seen),
            (model.get_audio_features, {"input_features": inputs["input_features"]}),
        ):
            states = features(**given, output_hidden_states=True, output_attentions=True)
            bare = features(**given)
            assert len(states.hidden_states) - 1 == len(states.attentions) > 0
            assert bare.hidden_states is None
            assert bare.attentions is None
            if not hasattr(model, "visual"):  # whose maps are transformers' own
                assert all(torch.allclose(rows.sum(-1), torch.ones(()), atol=1e-5) for rows in states.attentions)
            assert torch.equal(states.last_hidden_state, bare.last_hidden_state)
            assert states.hidden_states[-1].shape == states.hidden_states[0].shape
    if hasattr(model, "model") and hasattr(model.model, "vision_tower"):  # ours; transformers' towers keep their hooks
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


@torch.no_grad()
def test_embeddings_with_places_give_what_ids_do(family: Any) -> None:
    model, _, processor = family
    inputs = inputs_of(processor, audio=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    table = model.get_input_embeddings()
    with torch.no_grad():
        embeds = table(ids.clamp(max=len(table.weight) - 1))
    other = {"inputs_embeds": embeds, "attention_mask": mask, **media_of(inputs)}
    wanted = model(**inputs).logits[mask.bool()]
    assert torch.allclose(model(**other).logits[mask.bool()], wanted, atol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    for beams in ({}, {"num_beams": 2}):
        ours = model.generate(**other, **options, **beams)
        assert torch.equal(ours, model.generate(**inputs, **options, **beams)[:, ids.shape[1] :])
    with pytest.raises(MediaError, match="one of them"):
        model(**inputs, inputs_embeds=embeds)


@torch.no_grad()
def test_a_place_needs_media_and_media_a_place(family: Any) -> None:
    model, _, processor = family
    inputs = inputs_of(processor)
    bare = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for call in (model, lambda **given: model.generate(**given, max_new_tokens=2)):
        with pytest.raises(MediaError, match=r"placeholders of id|prompts show a video"):
            call(**bare)
    text = dict(processor([processor.prompt("Why?", video=False)] * 2))
    media = {name: value for name, value in media_of(inputs).items() if name != "position_ids"}
    with pytest.raises(MediaError, match=r"hold 0 placeholders|0 of the prompts show a video"):
        model(**{**text, **media})
    assert model(**text).logits.isfinite().all()


@torch.no_grad()
def test_a_placeholder_that_was_generated_is_no_place(family: Any) -> None:
    model, _, processor = family
    text = dict(processor(processor.prompt("Why?", video=False)))
    filled = of_output(model(**text, use_cache=True))
    id_ = torch.tensor([[processor.media.video_token_id]]).clamp(max=len(model.get_input_embeddings().weight) - 1)
    mask = torch.ones(1, text["input_ids"].shape[1] + 1, dtype=torch.long)
    assert model(input_ids=id_, attention_mask=mask, **as_argument(filled)).logits.isfinite().all()
