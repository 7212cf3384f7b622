"""The adapters of Qwen2.5-Omni and Qwen3-Omni: prompts, seconds, batches, loading thinkers and whole models."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLVideoProcessor

from fastav.adapter import Prepared, adapter_for
from fastav.budgets import Share
from fastav.engines.transformers import prune
from fastav.errors import CheckpointError, MediaError, MissingTrack
from fastav.layout import Layout, Modality
from fastav.media import Clip
from fastav.models._omni import OmniAdapter
from fastav.pipelines import resolve
from fastav.plan import Keep
from fastav.presets import fastav
from fastav.request import Request, Use
from support.families import qwen2_5_omni, qwen3_omni

FAMILIES = {"qwen2-5-omni": qwen2_5_omni, "qwen3-omni": qwen3_omni}
PATCHES = {"qwen2-5-omni": 14, "qwen3-omni": 16}


class Family:
    """An adapter, its tiny thinker and processor, and the module that builds them."""

    def __init__(self, name: str) -> None:
        self.module: Any = FAMILIES[name]
        self.model, self.processor = self.module.build()
        adapter = adapter_for([type(self.model).__name__])
        assert isinstance(adapter, OmniAdapter)
        self.adapter = adapter

    def prepare(self, *requests: Request) -> Prepared:
        return self.adapter.prepare(self.processor, requests)

    def logits(self, prepared: Prepared, model: Any = None) -> torch.Tensor:
        """The logits of each prompt's last token."""
        with torch.no_grad():
            return (model or self.model)(**prepared.inputs).logits[:, -1]


@cache
def family_of(name: str) -> Family:
    return Family(name)


@pytest.fixture(params=FAMILIES)
def family(request):
    return family_of(request.param)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def request_for(
    seconds: float, *, sound: float | None = None, use: Use = Use.AUTO, fps: int = 10, size: tuple[int, int] = (24, 32)
) -> Request:
    """A question about a clip.  seconds: of video (0: none). sound: seconds of audio (None: none)."""
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (round(seconds * fps), *size, 3), dtype=np.uint8) if seconds else None
    wave = None if sound is None else rng.uniform(-0.5, 0.5, round(sound * 16_000)).astype(np.float32)
    clip = Clip.from_arrays(frames=frames, fps=fps, waveform=wave, sample_rate=16_000)
    return Request(clip=clip, question="What?", use=use)


def expected_starts(name: str, columns: int) -> np.ndarray:
    """Start of each audio token of a spectrogram of 100 columns per second: a halving keeps every second column."""
    column = np.arange(columns)
    if name == "qwen2-5-omni":
        halved = column[::2]
        return halved[: len(halved) // 2 * 2 : 2] / 100
    return np.concatenate([column[at : at + 100][::2][::2][::2] for at in range(0, columns, 100)]) / 100


def seconds_of(layout: Layout, modality: Modality) -> np.ndarray:
    return layout.second[layout.modality == modality]


# --- prompts


@pytest.mark.parametrize("columns", [4, 8, 99, 100, 101, 109, 200, 1234])
def test_audio_tokens_start_where_the_encoder_s_halvings_put_them(family, columns):
    expected = expected_starts(family.adapter.name, columns)
    assert family.adapter.n_audio_tokens(columns) == len(expected)
    assert np.allclose(family.adapter.audio_starts(len(expected)), expected)
    (layout,) = family.prepare(request_for(0, sound=columns / 100)).layouts
    assert np.allclose(seconds_of(layout, Modality.AUDIO), expected, atol=1e-6)


def test_sound_longer_than_the_extractor_s_window_is_used_to_its_end(family):
    assert family.processor.feature_extractor.chunk_length == 5
    for request in (request_for(0, sound=12), request_for(12, sound=12)):
        (layout,) = family.prepare(request).layouts
        assert layout.count(Modality.AUDIO) == len(expected_starts(family.adapter.name, 1200))
        assert seconds_of(layout, Modality.AUDIO)[-1] > 11.9


@pytest.mark.parametrize("sound", [0.001, 0.01, 0.039])
def test_the_shortest_sound_is_one_token(family, sound):
    prepared = family.prepare(request_for(0, sound=sound))
    assert prepared.layouts[0].count(Modality.AUDIO) == 1
    assert family.logits(prepared).isfinite().all()


def test_video_and_sound_alternate_in_time(family):
    (layout,) = family.prepare(request_for(8, sound=8)).layouts
    media = layout.modality[layout.modality != Modality.TEXT]
    changes = np.flatnonzero(np.diff(media)) + 1
    second = np.concatenate([part[:1] for part in np.split(layout.second[~np.isnan(layout.second)], changes)])
    assert media[0] == Modality.VIDEO
    step = {"qwen2-5-omni": 2, "qwen3-omni": 1}[family.adapter.name]
    assert second.tolist() == np.repeat(np.arange(0, 8, step), 2).tolist()


def test_use_selects_the_tracks(family):
    for use, video, audio in ((Use.VIDEO, True, False), (Use.AUDIO, False, True), (Use.BOTH, True, True)):
        prepared = family.prepare(request_for(3, sound=3, use=use))
        (layout,) = prepared.layouts
        assert (layout.count(Modality.VIDEO) > 0, layout.count(Modality.AUDIO) > 0) == (video, audio)
        assert prepared.inputs.get("use_audio_in_video", False) == (video and audio)
        assert family.logits(prepared).isfinite().all()
    with pytest.raises(MissingTrack):
        family.prepare(request_for(3, use=Use.AUDIO))


@pytest.mark.parametrize(
    ("seconds", "max_frames", "spacing"), [(2.1, 768, 1.05), (8, 768, 1.0), (8, 4, 4.0), (0.2, 768, 0.2)]
)
def test_the_model_gets_the_spacing_of_the_frames(family, monkeypatch, seconds, max_frames, spacing):
    monkeypatch.setattr(family.processor.video_processor, "max_frames", max_frames)
    prepared = family.prepare(request_for(seconds, sound=seconds))
    assert prepared.inputs["video_second_per_grid"].tolist() == pytest.approx([spacing])
    frame_seconds = np.unique(seconds_of(prepared.layouts[0], Modality.VIDEO))
    assert np.allclose(np.diff(frame_seconds), spacing, atol=0.11)


def test_an_example_is_laid_out_as_the_processor_does(family):
    patch = PATCHES[family.adapter.name]
    _, processor = family.module.build()
    processor.video_processor = Qwen2VLVideoProcessor(patch_size=patch, cap_pixels_per_frame=True)
    request = request_for(5, sound=5, fps=2, size=(720, 1280))
    (real,) = family.adapter.prepare(processor, [request]).layouts
    layout = family.adapter.example(family.adapter.config(), seconds=5, text=20)
    for name in ("modality", "frame"):
        ours, theirs = (getattr(one, name)[one.modality != Modality.TEXT] for one in (layout, real))
        assert np.array_equal(ours, theirs), name


def test_a_question_cannot_open_a_block_of_media(family):
    for mark in ("vision_bos_token", "audio_eos_token"):
        word = getattr(family.processor, mark)
        request = Request(clip=request_for(1).clip, question=f"What is {word}?")
        with pytest.raises(MediaError, match="stands for media"):
            family.prepare(request)


# --- batches


def test_videos_with_and_without_sound_are_refused_in_one_batch(family):
    loud, silent = request_for(3, sound=3), request_for(2)
    with pytest.raises(MediaError, match="with and without audio in one batch"):
        family.prepare(loud, silent)
    with pytest.raises(MediaError, match="with and without audio in one batch"):
        family.prepare(loud, request_for(3, sound=3, use=Use.VIDEO))


@pytest.mark.parametrize("videos", [(3.0, 3.0), (3.0, None)])
def test_sound_alone_is_answered_beside_any_video_as_by_itself(family, videos):
    requests = [request_for(videos[0], sound=videos[1]), request_for(0, sound=2.3)]
    together = family.logits(family.prepare(*requests))
    for row, request in zip(together, requests, strict=True):
        alone = family.logits(family.prepare(request))[0]
        assert (row - alone).abs().max() < 1e-4 * alone.abs().max()


# --- the release, and checkpoints


def test_the_release_s_configuration_is_a_thinker_s(family):
    config: Any = family.adapter.config()
    assert type(config).__name__ == family.adapter.config_class
    marks = [config.audio_token_id, config.audio_start_token_id, config.vision_start_token_id]
    expected = {"qwen2-5-omni": [151646, 151647, 151652], "qwen3-omni": [151675, 151669, 151652]}
    assert marks == expected[family.adapter.name]
    assert config.video_token_id == 151656
    assert config.position_id_per_seconds == family.adapter.positions_per_second
    assert config.vision_config.patch_size == PATCHES[family.adapter.name]
    assert config.vision_config.out_hidden_size == config.audio_config.output_dim == config.text_config.hidden_size


def test_the_shape_of_the_release():
    dense, sparse = (family_of(name).adapter for name in FAMILIES)
    shape = dense.shape(dense.config())
    assert (shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads) == (28, 3584, 18944, 28, 4)
    shape = sparse.shape(sparse.config())
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (48, 2048, 32, 4, 128)
    assert shape.intermediate == 8 * 768


@pytest.mark.parametrize("kind", ["thinker", "whole"])
def test_a_thinker_is_loaded_from_its_own_folder_and_from_a_whole_model_s(family, kind, tmp_path):
    model = family.model if kind == "thinker" else family.module.full_model()
    model.save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    source = str(tmp_path)
    adapter, _, config = resolve(source)
    assert type(adapter) is type(family.adapter)
    assert type(config).__name__ == family.adapter.config_class
    assert set(config.architectures or ()) <= family.adapter.architectures
    loaded, processor = family.adapter.load(source, dtype=torch.float32, attn_implementation="sdpa")
    assert type(loaded).__name__ == family.adapter.model_class
    assert not loaded.training
    request = request_for(3, sound=3)
    theirs = family.adapter.prepare(processor, [request])
    assert torch.equal(theirs.inputs["input_ids"], family.prepare(request).inputs["input_ids"])
    expected = family.logits(theirs, family.adapter.language_model(model))
    assert (family.logits(theirs, loaded) - expected).abs().max() < 1e-5


def test_a_whole_model_is_pruned_in_its_thinker(family):
    plan, prepared = fastav(Keep(media=Share(0.5))), family.prepare(request_for(3, sound=3))
    model = family.module.full_model()
    inside = family.adapter.language_model(model)
    answers = []
    for pruned in (model, inside):
        with prune(pruned, plan, layouts=prepared.layouts, adapter=family.adapter):
            answers.append(family.logits(prepared, inside))
    assert torch.equal(*answers)
    assert (answers[0] - family.logits(prepared, inside)).abs().max() > 1e-2


def test_what_a_checkpoint_lacks_or_has_too_much_is_named(family, tmp_path):
    family.module.full_model().save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    gone = "thinker.model.layers.0.self_attn.q_proj.weight"

    def load(keys: dict[str, torch.Tensor]) -> None:
        save_file(keys, file, metadata={"format": "pt"})
        family.adapter.load(str(tmp_path))

    with pytest.raises(
        CheckpointError, match=r"lacks 1 key: model\.(language_model\.)?layers\.0\.self_attn\.q_proj\.weight"
    ):
        load({key: value for key, value in weights.items() if key != gone})
    with pytest.raises(CheckpointError, match=r"has unknown 1 key: .*surplus"):
        load({**weights, "thinker.surplus": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="has other shapes for 1 key"):
        load({**weights, "thinker.model.norm.weight": torch.zeros(1)})


def test_there_must_be_a_checkpoint(family, tmp_path):
    for source in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="no readable checkpoint"):
            family.adapter.load(str(source))
    Path(tmp_path / "config.json").write_text(json.dumps({"thinker_config": {}})[:-1])
    with pytest.raises(CheckpointError):
        family.adapter.config(str(tmp_path))
