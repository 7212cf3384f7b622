"""What stock transformers code needs here: a checkpoint of Qwen2.5-Omni that is tiny and random, and decoded clips."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.audio_utils
import transformers.processing_utils
from transformers import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

import fastav
from support.families import qwen2_5_omni

NAME = "Qwen/Qwen2.5-Omni-7B"  # the checkpoint that it stands for


def save_omni(folder: Path) -> Path:
    """Save the whole model, as the release has it, with its processor."""
    qwen2_5_omni.full_model().save_pretrained(folder)
    qwen2_5_omni.processor().save_pretrained(folder)
    torch.save({"Chelsie": {}}, folder / "spk_dict.pt")
    return folder


def decode_with_pyav(patch: pytest.MonkeyPatch) -> None:
    """Let transformers read clips with PyAV instead of torchcodec, which is not installed."""

    def fetch(self: Any, source: Any, sample_indices_fn: Any = None) -> Any:
        if isinstance(source, list):
            return list(zip(*[fetch(self, one, sample_indices_fn) for one in source], strict=True))
        track = fastav.Clip.open(source).require_video()
        metadata = VideoMetadata(total_num_frames=track.frames, fps=track.fps, duration=track.duration)
        every = sample_indices_fn is None
        indices = np.arange(track.frames) if every else np.asarray(sample_indices_fn(metadata=metadata)).astype(int)
        metadata.frames_indices = indices
        return track.read(indices.tolist()), metadata

    def load(source: Any, sampling_rate: int = 16_000, **_: Any) -> Any:
        return np.asarray(fastav.Clip.open(source).require_audio().read(sampling_rate))

    patch.setattr(BaseVideoProcessor, "fetch_videos", fetch)
    patch.setattr(transformers.audio_utils, "load_audio", load)
    patch.setattr(transformers.processing_utils, "load_audio", load)
