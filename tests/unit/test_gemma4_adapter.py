"""Gemma 4 beyond the contract tests: the release's numbers, seconds of tokens, and loading."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Gemma4VideoProcessor,
)

from fastav.errors import CheckpointError, MediaError
from fastav.flops import kv_bytes, prefill_flops
from fastav.layout import Modality
from fastav.media import Clip
from fastav.models._gemma import gemma_shape
from fastav.models.gemma4 import Gemma4Adapter
from fastav.request import Request, Use
from support.costs import counted_flops
from support.families import gemma4


@pytest.fixture(scope="module")
def adapter():
    return Gemma4Adapter()


@pytest.fixture(scope="module")
def tiny():
    return gemma4.build()


def clip_of(*, frames=None, samples=None, fps=10):
    rng = np.random.default_rng(1)
    return Clip.from_arrays(
        frames=None if frames is None else rng.integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8),
        fps=fps,
        waveform=None if samples is None else rng.uniform(-0.5, 0.5, samples).astype(np.float32),
        sample_rate=None if samples is None else 16_000,
    )


# --- numbers


def test_the_release_has_the_layers_of_e4b(adapter):
    shape = adapter.shape(adapter.config())
    assert (shape.layers, shape.hidden, shape.intermediate, shape.kv_layers) == (42, 2560, 10_240, 24)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (8, 2, 256)
    full = [layer for layer, window in enumerate(shape.windows) if not window]
    assert full == [5, 11, 17, 23, 29, 35, 41]
    assert [layer for layer in range(42) if shape.layer(layer).head_dim == 512] == full
    # 20 layers hold a window's 511 tokens of two heads of 256, four hold all of two heads of 512
    assert kv_bytes(shape, [3000] * 42) == 2 * 2 * 2 * (20 * 511 * 256 + 4 * 3000 * 512)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_shared_layers": 4, "use_double_wide_mlp": True},
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8},
    ],
    ids=["E2B", "31B", "26B-A4B"],
)
def test_flops_of_every_size_are_what_pytorch_counts(options):
    config = Gemma4TextConfig(
        vocab_size=32,
        vocab_size_per_layer_input=32,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        **options,
    )
    model = Gemma4ForCausalLM._from_config(config, attn_implementation="eager").eval()
    counted = counted_flops(model, model.model.layers, {"input_ids": torch.ones(1, 7, dtype=torch.long)})
    assert counted == prefill_flops(gemma_shape(config), [7] * 12, causal=False)


@pytest.mark.parametrize(("seconds", "audio"), [(10, 250), (30, 750), (60, 1500)])
def test_tokens_of_clips_of_720p(adapter, seconds, audio):
    layout = adapter.example(adapter.config(), seconds=seconds, text=44)
    assert layout.by_modality() == {"text": 44, "audio": audio, "video": 32 * 66}
    assert not layout.padding.any()


def test_a_frame_of_720p_has_as_many_tokens_as_the_processor_says(adapter):
    outputs = Gemma4VideoProcessor()(np.zeros((1, 720, 1280, 3), np.uint8), do_sample_frames=False, return_tensors="pt")
    assert outputs["num_soft_tokens_per_video"].tolist() == [66]


@pytest.mark.parametrize("samples", [1_600, 16_000, 160_000, 479_999, 480_000])
def test_audio_tokens_are_as_many_as_mel_frames_after_two_strides(tiny, adapter, samples):
    mask = Gemma4AudioFeatureExtractor()([np.zeros(samples, np.float32)])["input_features_mask"][0]
    request = Request(clip=clip_of(samples=samples), question="?", use=Use.AUDIO)
    (layout,) = adapter.prepare(tiny[1], [request]).layouts
    assert layout.count(Modality.AUDIO) == mask[::2][::2].sum()
    assert abs(layout.count(Modality.AUDIO) - samples / 640) < 1


# --- layouts


def test_seconds_are_those_of_frames_and_of_pieces(tiny, adapter):
    request = Request(clip=clip_of(frames=350, samples=496_000), question="What?")
    (layout,) = adapter.prepare(tiny[1], [request]).layouts
    video, audio = layout.modality == Modality.VIDEO, layout.modality == Modality.AUDIO
    assert np.allclose(np.unique(layout.second[video]), [0, 8.7, 17.5, 26.2])  # frames 0, 87, 175, 262 of 350
    assert np.array_equal(np.unique(layout.frame[video]), np.arange(4))
    assert np.allclose(layout.second[audio], [*(np.arange(750) * 0.04), *(30 + np.arange(25) * 0.04)])


def test_a_last_piece_too_short_for_a_token_is_left_out(tiny, adapter):
    def count(samples):
        request = Request(clip=clip_of(samples=samples), question="?", use=Use.AUDIO)
        return adapter.prepare(tiny[1], [request]).layouts[0].count(Modality.AUDIO)

    assert count(480_000) == count(481_599) < count(481_600)
    with pytest.raises(MediaError, match=r"less than 0\.1 s of audio"):
        count(1_599)


# --- loading


@pytest.fixture
def checkpoint(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("attention", [None, "eager", "sdpa"])
def test_a_saved_model_answers_alike_with_any_attention(tiny, adapter, checkpoint, attention):
    request = Request(clip=clip_of(frames=20, samples=20_000), question="What?")
    options = {} if attention is None else {"attn_implementation": attention}
    loaded, processor = adapter.load(str(checkpoint), dtype="float32", **options)
    assert loaded.config.text_config._attn_implementation == (attention or "sdpa")
    model, inputs = tiny[0], adapter.prepare(processor, [request]).inputs
    ways = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = (torch.stack(each.generate(**inputs, **ways).logits) for each in (loaded, model))
    assert (ours - theirs).abs().max() < 1e-3


def test_a_missing_key_is_refused(adapter, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors.pop("model.language_model.layers.2.mlp.down_proj.weight")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 key: model\.language_model\.layers\.2\.mlp\.down_proj"):
        adapter.load(str(checkpoint))
