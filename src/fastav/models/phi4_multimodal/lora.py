"""Merging of a LoRA that a checkpoint stores beside the decoder's weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from fastav.errors import CheckpointError
from fastav.models._checkpoint import refuse

PREFIX = "base_model.model."  # the peft library's prefix of module names
VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


def merge(model: PreTrainedModel, source: str, folder: str, hub: Mapping[str, Any]) -> None:
    """Merge the LoRA in a folder of a checkpoint into the model: add B A alpha / r to each weight.

    hub: options of the download.
    Raises: OSError if the folder does not exist; CheckpointError if it contains anything but pairs of LoRA factors for
    the model's weights.
    """
    settings, pairs = _read(source, folder, hub)
    modules: dict[str, Any] = dict(model.named_modules())
    weights = {name: modules[name].weight.data for name in pairs if hasattr(modules.get(name), "weight")}
    refuse("has unknown", sorted(pairs.keys() - weights.keys()), f"{source}/{folder}")
    refuse(
        "lacks one LoRA factor of", sorted(name for name, pair in pairs.items() if len(pair) < 2), f"{source}/{folder}"
    )
    shapes = {name: (pair["lora_B"].shape[0], pair["lora_A"].shape[1]) for name, pair in pairs.items()}
    misfits = sorted(name for name, shape in shapes.items() if tuple(weights[name].shape) != shape)
    refuse("has other shapes for", misfits, f"{source}/{folder}")
    scale = settings["lora_alpha"] / settings["r"]
    for name, pair in pairs.items():
        delta = scale * (pair["lora_B"].float() @ pair["lora_A"].float())
        weights[name].copy_(weights[name].float() + delta.to(weights[name].device))


def _read(source: str, folder: str, hub: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The LoRA's settings, and its two factors by module name."""
    options = {**hub, "subfolder": str(Path(hub.get("subfolder") or "", folder))}
    files = [cached_file(source, name, **options) for name in ("adapter_config.json", "adapter_model.safetensors")]
    settings = json.loads(Path(str(files[0])).read_text(encoding="utf-8"))
    if unsupported := [name for name in VARIANTS if settings.get(name)]:
        raise CheckpointError(f"the LoRA {source}/{folder} has unsupported settings: {', '.join(unsupported)}")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(str(files[1])).items():
        module, _, factor = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        pairs.setdefault(module, {})[factor] = tensor
    return settings, pairs
