"""Phi-4-multimodal beyond the contract tests: the release's numbers, padding, seconds, and loading."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastav.errors import CheckpointError, MediaError
from fastav.layout import Modality
from fastav.media import Clip
from fastav.models.phi4_multimodal import Phi4MultimodalAdapter
from fastav.models.phi4_multimodal.adapter import image_padding
from fastav.request import Request, Use
from support.families import phi4_multimodal

RANK, ALPHA = 2, 4


@pytest.fixture(scope="module")
def adapter():
    return Phi4MultimodalAdapter()


@pytest.fixture(scope="module")
def tiny():
    return phi4_multimodal.build()


def clip_of(frames, size, *, fps=10, samples=None):
    rng = np.random.default_rng(1)
    return Clip.from_arrays(
        frames=rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8),
        fps=fps,
        waveform=None if samples is None else rng.uniform(-0.5, 0.5, samples).astype(np.float32),
        sample_rate=None if samples is None else 16_000,
    )


@pytest.fixture
def prepared(adapter, tiny):
    return adapter.prepare(tiny[1], [Request(clip=clip_of(15, (36, 64), samples=30_000), question="What?")])


def write_lora(folder, model, names, *, seed=0, **settings):
    """Write a folder with a vision LoRA, as the peft library does."""
    torch.manual_seed(seed)
    tensors = {}
    for name in names:
        rows, columns = model.get_submodule(name).weight.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK)
    (folder / "vision-lora").mkdir()
    save_file(tensors, folder / "vision-lora" / "adapter_model.safetensors")
    written = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA", **settings}
    (folder / "vision-lora" / "adapter_config.json").write_text(json.dumps(written))
    return tensors


NAMES = ["model.layers.0.self_attn.qkv_proj", "model.layers.3.mlp.down_proj"]


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A folder of weights without the vision LoRA merged."""
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("merged_adapter") == "vision-lora"
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


# --- numbers


def test_the_release_has_the_heads_of_phi_4_mini(adapter):
    shape = adapter.shape(adapter.config())
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (32, 3072, 24, 8, 128)


@pytest.mark.parametrize(("seconds", "images", "audio"), [(10, 10, 125), (30, 16, 375), (60, 16, 750)])
def test_tokens_of_clips_of_720p(adapter, seconds, images, audio):
    layout = adapter.example(adapter.config(), seconds=seconds, text=44)
    assert layout.by_modality() == {"text": 44, "image": images * 426, "audio": audio}
    assert layout.padding.sum() == images * 7 * 17


def test_an_image_of_the_release_has_as_many_tokens_as_the_processor_says(adapter):
    from transformers import Phi4MultimodalImageProcessor

    read = Phi4MultimodalImageProcessor()
    for height, width in ((720, 1280), (1280, 720), (448, 448), (300, 1000)):
        outputs = read(np.zeros((height, width, 3), np.uint8), dynamic_hd=1, return_tensors="pt")
        is_picture = outputs["image_attention_mask"][0, 1, ::2, ::2]
        rows, columns = int(is_picture[:, 0].sum()), int(is_picture[0].sum())
        empty = image_padding(rows=1, columns=1, height=rows, width=columns)
        assert len(empty) == int(outputs["num_img_tokens"][0])
        # of the whole, the lines and columns that the one crop leaves out, and their ends
        assert empty.sum() == (16 - rows) * 17 + rows * (16 - columns)


def test_padding_of_an_image_of_several_crops_is_where_its_smaller_whole_is_white(adapter, tiny):
    model, processor = tiny
    image = np.zeros((100, 130, 3), np.uint8)  # 2 x 3 crops of 64 pixels, of which 128 x 166 pixels are filled
    inputs = processor(text=["<|image|>"], images=[image], images_kwargs={"dynamic_hd": 36}, return_tensors="pt")
    (layout,) = adapter.layouts(model.config, inputs)
    whole = layout.padding[-16 * 17 :].reshape(16, 17)
    white = (inputs["image_pixel_values"][0, 0] == 1).all(0).numpy().reshape(16, 4, 16, 4).all((1, 3))
    assert white.any()
    assert (whole[:, :16] <= white).all()  # nothing of the picture is called padding
    assert (white & ~whole[:, :16]).sum() <= 32  # at most a line and a column that are nearly white
    assert layout.padding.sum() == whole.sum()


def test_seconds_are_those_of_frames_and_of_the_convolutions_steps(adapter, tiny, prepared):
    (layout,) = prepared.layouts
    images, audio = layout.modality == Modality.IMAGE, layout.modality == Modality.AUDIO
    assert np.allclose(np.unique(layout.second[images & ~layout.padding]), [0.3, 1.1])
    # 30,000 samples: 186 mel frames of 10 ms, eight of which make a token
    assert audio.sum() == 24
    assert np.allclose(layout.second[audio], np.arange(24) * 0.08)


# --- batches and refusals


def test_a_batch_of_sounds_is_what_the_official_processor_makes_of_it(adapter, tiny):
    _, processor = tiny
    requests = [Request(clip=clip_of(5, (24, 32), samples=n), question="?") for n in (30_000, 21_111)]
    inputs = adapter.prepare(processor, requests).inputs
    waves = [request.clip.require_audio().read(16_000) for request in requests]
    official = processor.audio_processor(waves, sampling_rate=16_000, return_tensors="pt")
    assert torch.equal(inputs["audio_embed_sizes"], official["audio_embed_sizes"])
    mask = inputs["audio_attention_mask"]
    assert torch.equal(mask, official["audio_attention_mask"])
    assert torch.equal(inputs["audio_input_features"][mask], official["audio_input_features"][mask])


def test_audio_alone_is_refused(adapter, tiny):
    request = Request(clip=clip_of(5, (24, 32), samples=30_000), question="?", use=Use.AUDIO)
    with pytest.raises(MediaError, match="audio alone"):
        adapter.prepare(tiny[1], [request])


def test_too_short_audio_is_refused(adapter, tiny):
    with pytest.raises(MediaError, match="less than 25 ms of audio"):
        adapter.prepare(tiny[1], [Request(clip=clip_of(5, (24, 32), samples=399), question="?")])


# --- loading


def test_the_vision_lora_is_merged_once(adapter, tiny, checkpoint, prepared, tmp_path_factory):
    model, _ = tiny
    tensors = write_lora(checkpoint, model, NAMES)
    loaded, processor = adapter.load(str(checkpoint))
    for name in NAMES:
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        expected = model.get_submodule(name).weight + ALPHA / RANK * b @ a
        assert torch.allclose(loaded.get_submodule(name).weight, expected, atol=1e-5)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    again = tmp_path_factory.mktemp("again")
    loaded.save_pretrained(again)
    processor.save_pretrained(again)
    same, _ = adapter.load(str(again))
    with torch.no_grad():
        assert torch.equal(loaded(**prepared.inputs).logits, same(**prepared.inputs).logits)
        assert not torch.allclose(loaded(**prepared.inputs).logits, model(**prepared.inputs).logits)


def test_a_checkpoint_without_its_vision_lora_is_refused(adapter, checkpoint):
    with pytest.raises(CheckpointError, match="vision-lora"):
        adapter.load(str(checkpoint))


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["model.norm", *NAMES], {}, "other shapes for 1 key: model.norm"),
        (NAMES, {"use_dora": True}, "unsupported settings: use_dora"),
    ],
)
def test_a_lora_with_unsupported_settings_or_shapes_is_refused(adapter, tiny, checkpoint, names, settings, message):
    model, _ = tiny
    tensors = write_lora(checkpoint, model, NAMES, **settings)
    if "model.norm" in names:
        tensors["base_model.model.model.norm.lora_A.weight"] = torch.randn(RANK, 3)
        tensors["base_model.model.model.norm.lora_B.weight"] = torch.randn(3, RANK)
        save_file(tensors, checkpoint / "vision-lora" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        adapter.load(str(checkpoint))


def test_a_lora_for_unknown_modules_or_with_one_factor_is_refused(adapter, tiny, checkpoint):
    model, _ = tiny
    tensors = write_lora(checkpoint, model, NAMES)
    file = checkpoint / "vision-lora" / "adapter_model.safetensors"
    save_file({**tensors, "base_model.model.model.nowhere.lora_A.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match=r"unknown 1 key: model\.nowhere"):
        adapter.load(str(checkpoint))
    tensors.pop(f"base_model.model.{NAMES[0]}.lora_B.weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"lacks one LoRA factor of 1 key: {NAMES[0]}"):
        adapter.load(str(checkpoint))


def test_a_missing_key_is_refused(adapter, tiny, checkpoint):
    write_lora(checkpoint, tiny[0], NAMES)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors.pop("model.layers.2.mlp.down_proj.weight")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 key: model\.layers\.2\.mlp\.down_proj\.weight"):
        adapter.load(str(checkpoint))
