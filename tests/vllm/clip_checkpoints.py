"""Checkpoints of the originals' form, with random weights and heads wide enough for vLLM's CPU attention.

Configuration, tokenizer and clips are those of the reference bundles; what is left out of the weights is what the
originals leave out.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from checkpoints import HEADS
from safetensors.torch import save_file

from fastav.registry import MODELS
from support.families._tiny import randomized

BUNDLES = Path(__file__).parents[1] / "reference"
DEPTH = 6
SHORT = {"audio_seconds": 4, "audio_clips": 2, "audio_clip_seconds": 1, "num_mel_bins": 48}  # BEATs' sound


def videollama2(folder: Path, **settings: Any) -> Path:
    """VideoLLaMA2 whose SigLIP is in a folder of its own, and whose table of positions in sound is there once."""
    made = HEADS | {"hidden_size_a": HEADS["hidden_size"]} | SHORT

    def left_out(name: str) -> bool:
        return ".vision_tower." in name or ("relative_attention_bias" in name and ".layers.0." not in name)

    return _written(folder, "videollama2", made, left_out, settings)


def video_salmonn2(folder: Path, **settings: Any) -> Path:
    """video-SALMONN 2, with the dimensions of its parts in a file beside it."""
    return _written(folder, "video-salmonn2", HEADS, lambda name: name.endswith("position_ids"), settings)


def _written(folder: Path, name: str, made: dict[str, Any], left_out: Any, settings: dict[str, Any]) -> Path:
    bundle, adapter = BUNDLES / name.replace("-", "_"), MODELS[name]()
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("golden*", "model.safetensors"), dirs_exist_ok=True)
    for tower in bundle.glob("siglip*"):
        shutil.copy(tower / "model.safetensors", folder / tower.name)
    written = json.loads((bundle / "config.json").read_text()) | made | {"num_hidden_layers": DEPTH}
    (folder / "config.json").write_text(json.dumps(written))
    if settings:
        path = folder / "generation_config.json"
        path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | settings))
    model = randomized(adapter.build(adapter.config(str(folder))), "sdpa", scale=0.15)
    weights = {key: value.contiguous() for key, value in model.state_dict().items() if not left_out(key)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        adapter.load(str(folder), dtype=torch.float32)  # it is whole
    return folder
