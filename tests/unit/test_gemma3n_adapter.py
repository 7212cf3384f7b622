"""Gemma 3n beyond the contract tests: the release's numbers, padding, seconds, and loading."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastav.errors import CheckpointError
from fastav.layout import Modality
from fastav.media import Clip
from fastav.models.gemma3n import Gemma3nAdapter
from fastav.request import Request, Use
from support.families import gemma3n


@pytest.fixture(scope="module")
def adapter():
    return Gemma3nAdapter()


@pytest.fixture(scope="module")
def tiny():
    return gemma3n.build()


def clip_of(*, frames=None, samples=None):
    rng = np.random.default_rng(1)
    return Clip.from_arrays(
        frames=None if frames is None else rng.integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8),
        fps=10,
        waveform=None if samples is None else rng.uniform(-0.5, 0.5, samples).astype(np.float32),
        sample_rate=None if samples is None else 16_000,
    )


# --- numbers


def test_the_release_has_the_layers_of_e4b(adapter):
    shape = adapter.shape(adapter.config())
    assert (shape.layers, shape.hidden, shape.intermediate, shape.kv_layers) == (35, 2048, 16_384, 20)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (8, 2, 256)
    assert [layer for layer, window in enumerate(shape.windows) if not window] == [4, 9, 14, 19, 24, 29, 34]


@pytest.mark.parametrize(
    ("seconds", "images", "audio", "padding"), [(10, 10, 188, 125), (30, 30, 188, 0), (60, 32, 376, 0)]
)
def test_tokens_of_clips_of_720p(adapter, seconds, images, audio, padding):
    layout = adapter.example(adapter.config(), seconds=seconds, text=44)
    assert layout.by_modality() == {"text": 44, "audio": audio, "image": images * 256}
    assert layout.padding.sum() == padding


# --- layouts


@pytest.mark.parametrize("samples", [1_600, 20_000, 160_000, 480_000, 640_000])
def test_padding_is_where_the_model_masks_its_audio_features(tiny, adapter, samples):
    model, processor = tiny
    request = Request(clip=clip_of(samples=samples), question="?", use=Use.AUDIO)
    prepared = adapter.prepare(processor, [request])
    inputs, (layout,) = prepared.inputs, prepared.layouts
    with torch.no_grad():
        features = model.model.get_audio_features(
            inputs["input_features"], ~inputs["input_features_mask"], return_dict=True
        )
    expected = [[*mask, *[True] * (188 - len(mask))] for mask in features.audio_mel_mask.tolist()]
    assert np.array_equal(layout.padding[layout.modality == Modality.AUDIO], np.concatenate(expected))
    example = adapter.example(adapter.config(), seconds=samples / 16_000, text=4)
    assert np.array_equal(example.padding[example.modality == Modality.AUDIO], np.concatenate(expected))


def test_seconds_are_those_of_frames_and_of_pieces(tiny, adapter):
    request = Request(clip=clip_of(frames=25, samples=496_000), question="What?")
    (layout,) = adapter.prepare(tiny[1], [request]).layouts
    image, audio = layout.modality == Modality.IMAGE, layout.modality == Modality.AUDIO
    assert np.allclose(np.unique(layout.second[image]), [0.4, 1.2, 2.0])  # frames 4, 12, 20 of 25
    audio_seconds = layout.second[audio & ~layout.padding]
    assert np.allclose(audio_seconds, [*(np.arange(188) * 0.16), *(30 + np.arange(7) * 0.16)])


# --- loading


@pytest.fixture
def checkpoint(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_model_answers_alike(tiny, adapter, checkpoint):
    loaded, processor = adapter.load(str(checkpoint), dtype="float32")
    inputs = adapter.prepare(processor, [Request(clip=clip_of(frames=20, samples=20_000), question="What?")]).inputs
    with torch.no_grad():
        assert (loaded(**inputs).logits - tiny[0](**inputs).logits).abs().max() < 1e-3


def test_a_missing_key_is_refused(adapter, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors.pop("model.language_model.layers.2.mlp.down_proj.weight")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 key: model\.language_model\.layers\.2\.mlp\.down_proj"):
        adapter.load(str(checkpoint))
