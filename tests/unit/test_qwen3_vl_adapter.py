"""Qwen3-VL: the release's numbers, prompts with times in them, and loading, dense and sparse."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLVideoProcessor
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.video_utils import VideoMetadata

from fastav.adapter import adapter_for
from fastav.budgets import Share
from fastav.engines.transformers import prune
from fastav.errors import CheckpointError, MediaError
from fastav.layout import Modality
from fastav.media import Clip
from fastav.models.qwen3_vl import Qwen3VLAdapter
from fastav.plan import Keep
from fastav.presets import fastav
from fastav.request import Request
from support.families import qwen3_vl, qwen3_vl_moe
from support.masked import masked_logits, rules_of

ADAPTER = Qwen3VLAdapter()
FAMILIES = {"dense": qwen3_vl, "sparse": qwen3_vl_moe}


def moving(frames: int, fps: int = 10) -> Clip:
    pictures = np.random.default_rng(0).integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8)
    return Clip.from_arrays(frames=pictures, fps=fps)


@pytest.fixture(scope="module")
def processor():
    return qwen3_vl.parts()[0]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A model with its processor, and the folder where both are."""
    model, processor = FAMILIES[request.param].build()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


# --- the release


def test_the_release_is_the_8b_model():
    config = ADAPTER.config()
    shape = ADAPTER.shape(config)
    assert (shape.layers, shape.hidden, shape.intermediate) == (36, 4096, 12_288)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab) == (32, 8, 128, 151_936)
    vision = config.vision_config
    assert (vision.depth, vision.hidden_size, vision.out_hidden_size) == (27, 1152, 4096)
    assert list(vision.deepstack_visual_indexes) == [8, 16, 24]
    assert (config.video_token_id, config.text_config.max_position_embeddings) == (151_656, 262_144)


def test_the_preset_cuts_after_the_last_layer_that_vision_enters():
    config = ADAPTER.config()
    assert ADAPTER.preset("fastav").cuts(36)[0][0] == 18 > len(config.vision_config.deepstack_visual_indexes)


@pytest.mark.parametrize(("seconds", "tokens"), [(10, 7_200), (30, 11_700), (60, 11_400)])
def test_example_clips_have_the_tokens_in_the_docs(seconds, tokens):
    layout = ADAPTER.example(ADAPTER.config(), seconds=seconds, text=44)
    assert layout.by_modality() == {"text": 44, "video": tokens}
    assert not layout.padding.any()


@pytest.mark.parametrize("seconds", [0.2, 1, 2.5, 3.5, 10, 17.5, 30, 60, 500])
@pytest.mark.parametrize("size", [(720, 1280), (480, 640), (64, 48)])
def test_examples_agree_with_the_official_processor(seconds, size):
    released = Qwen3VLVideoProcessor()
    metadata = VideoMetadata(total_num_frames=round(seconds * 25), fps=25.0, duration=seconds, width=1, height=1)
    frames = len(released.sample_frames(metadata))
    scaled = released.resize(
        torch.empty(1, frames, 3, *size, dtype=torch.uint8, device="meta"),
        SizeDict(shortest_edge=4_096, longest_edge=25_165_824),
        PILImageResampling.BICUBIC,
        factor=32,
        temporal_factor=2,
        cap_pixels_per_frame=True,
    )
    assert ADAPTER.release_grid(seconds, *size) == (-(-frames // 2), scaled.shape[-2] // 32, scaled.shape[-1] // 32)


def test_sound_is_refused_in_examples():
    with pytest.raises(MediaError, match="does not take audio"):
        ADAPTER.example(ADAPTER.config(), audio=3, text=5)


def test_the_mlp_of_a_sparse_model_is_the_experts_that_a_token_passes_through():
    config = qwen3_vl_moe.build()[0].config
    assert ADAPTER.shape(config).intermediate == 2 * 32


# --- prompts


@pytest.mark.parametrize("frames", [1, 2, 21, 40, 55])
def test_every_group_of_tokens_follows_the_time_of_its_two_frames(processor, frames):
    prepared = ADAPTER.prepare(processor, [Request(clip=moving(frames), question="?")])
    (layout,) = prepared.layouts
    count = max(min(max(int(frames / 10 * 2), 4), 768, frames), 1)
    picked = np.linspace(0, frames - 1, count).round().astype(int)
    picked = np.append(picked, picked[-1:]) if count % 2 else picked
    text = processor.decode(prepared.inputs["input_ids"][0])
    written = [float(time) for time in re.findall(r"<(\d+\.\d) seconds>", text)]
    assert written == [float(f"{time:.1f}") for time in (picked / 10).reshape(-1, 2).mean(1)]
    video = layout.modality == Modality.VIDEO
    starts = np.flatnonzero(video & ~np.roll(video, 1))
    assert len(starts) == len(written)
    assert layout.frame[starts].tolist() == list(range(0, len(picked), 2))
    assert np.allclose(layout.second[starts], picked[::2] / 10)
    assert np.isnan(layout.second[~video]).all()


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("kind", FAMILIES)
def test_tokens_that_leave_before_all_of_vision_has_entered_leave_exactly(kind, start):
    model, processor = FAMILIES[kind].build()
    prepared = ADAPTER.prepare(processor, [Request(clip=moving(30), question="What?")])
    (layout,) = prepared.layouts
    plan = fastav(Keep(media=Share(0.6)), start=start)
    with prune(model, plan, layouts=prepared.layouts, adapter=ADAPTER):
        out = model.generate(
            **prepared.inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    layers = ADAPTER.decoder(model).layers
    expected = masked_logits(model, layers, prepared.inputs, out.sequences[0, -3:], rules_of(plan, layout, len(layers)))
    assert (torch.cat(out.logits) - expected).abs().max() < 1e-3 * expected.abs().max()


# --- loading


def test_a_saved_model_loads_by_its_own_classes_and_answers_the_same(saved):
    model, processor, folder = saved
    loaded, read = ADAPTER.load(str(folder))
    assert type(loaded) is type(model)
    assert type(ADAPTER.config(str(folder))) is type(model.config)
    assert isinstance(adapter_for(loaded.config.architectures), Qwen3VLAdapter)
    requests = [Request(clip=moving(20), question="Who?")]
    before, after = ADAPTER.prepare(processor, requests), ADAPTER.prepare(read, requests)
    with torch.no_grad():
        assert torch.equal(loaded(**after.inputs).logits, model(**before.inputs).logits)


def test_a_checkpoint_that_lacks_a_key_is_refused(saved, tmp_path):
    _, _, folder = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 key: model\.language_model\.norm\.weight"):
        ADAPTER.load(str(tmp_path))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        ADAPTER.load(str(tmp_path))
