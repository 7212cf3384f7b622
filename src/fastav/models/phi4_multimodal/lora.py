"""Low-rank changes to a decoder's weights that lie beside them in a checkpoint."""

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

PREFIX = "base_model.model."  # what the peft library writes before the name of a module
VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


def merge(model: PreTrainedModel, source: str, folder: str, hub: Mapping[str, Any]) -> None:
    """Add the changes in a folder of a checkpoint to the weights they are for: each is B A alpha / r.

    hub: options of the download.
    Raises: OSError if there is no such folder; CheckpointError if it holds anything but pairs for the model's weights.
    """
    settings, pairs = _read(source, folder, hub)
    known: dict[str, Any] = dict(model.named_modules())
    weights = {name: known[name].weight.data for name in pairs if hasattr(known.get(name), "weight")}
    refuse("has unknown", sorted(pairs.keys() - weights.keys()), f"{source}/{folder}")
    refuse("lacks half of", sorted(name for name, pair in pairs.items() if len(pair) < 2), f"{source}/{folder}")
    shapes = {name: (pair["lora_B"].shape[0], pair["lora_A"].shape[1]) for name, pair in pairs.items()}
    misfits = sorted(name for name, shape in shapes.items() if tuple(weights[name].shape) != shape)
    refuse("has other shapes for", misfits, f"{source}/{folder}")
    scale = settings["lora_alpha"] / settings["r"]
    for name, pair in pairs.items():
        change = scale * (pair["lora_B"].float() @ pair["lora_A"].float())
        weights[name].copy_(weights[name].float() + change.to(weights[name].device))


def _read(source: str, folder: str, hub: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The settings, and the two factors by the name of their module."""
    at = {**hub, "subfolder": str(Path(hub.get("subfolder") or "", folder))}
    files = [cached_file(source, name, **at) for name in ("adapter_config.json", "adapter_model.safetensors")]
    settings = json.loads(Path(str(files[0])).read_text(encoding="utf-8"))
    if found := [name for name in VARIANTS if settings.get(name)]:
        raise CheckpointError(f"the adapter {source}/{folder} is not plain: it sets {', '.join(found)}")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(str(files[1])).items():
        module, _, factor = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        pairs.setdefault(module, {})[factor] = tensor
    return settings, pairs
