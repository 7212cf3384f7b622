"""The file of a conversation: its pruned cache as tensors (safetensors), and everything else as JSON in the header."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from fastav.engines.transformers.kv_cache import PrunedLayer
from fastav.errors import FastAVError, reason_of
from fastav.files import atomic_write
from fastav.pruning.compiled import CompiledPlan

KEY, VERSION = "fastav_conversation", 1
SAMPLED = 16  # numbers of a parameter that its fingerprint reads


def fingerprint_of(config: PreTrainedConfig) -> str:
    """A short name of a model's configuration, without its dtype, its place, and how it attends."""
    return sha256(json.dumps(_lasting(config.to_dict()), sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_of(model: nn.Module) -> str:
    """A short name of a model's weights and active adapters, from a few numbers of every parameter."""
    digest = sha256()
    for name, value in model.named_parameters():
        digest.update(f"{name}{list(value.shape)}".encode())
        if value.device.type != "meta":  # whose weights are offloaded
            flat = value.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].float().cpu().numpy().tobytes())
    for name, module in model.named_modules():
        if hasattr(module, "merged_adapters"):  # a layer with LoRA
            adapters: Any = module
            digest.update(f"{name}{adapters.active_adapters}{adapters.disable_adapters}".encode())
    return digest.hexdigest()[:16]


def save(
    path: Path,
    identity: Mapping[str, str],
    fields: Mapping[str, Any],
    layers: Sequence[Any],
    tokens: Mapping[str, Tensor],
) -> None:
    """Write a conversation.

    identity: what a file must agree in to be loaded. fields: JSON. layers: of the cache. tokens: tensors by name.
    Raises: FastAVError if the file cannot be written; an earlier file of that name then stays.
    """
    tensors = {f"tokens.{name}": value for name, value in tokens.items()}
    kinds: list[dict[str, Any]] = []
    for index, layer in enumerate(layers):
        tensors |= {f"layers.{index}.keys": layer.keys, f"layers.{index}.values": layer.values}
        if not isinstance(layer, PrunedLayer):
            kinds.append({"length": layer.get_seq_length()})
            continue
        tensors[f"layers.{index}.slots"] = layer.slots
        if layer.valid is not None:
            tensors[f"layers.{index}.valid"] = layer.valid
        kinds.append({"pruned": True, "prompt": layer.prompt, "owner": layer.owner, "window": layer.window})
    header = {"version": VERSION, **identity, "fields": fields, "layers": kinds}
    try:
        with atomic_write(path) as part:
            save_file({name: value.cpu().clone() for name, value in tensors.items()}, part, {KEY: json.dumps(header)})
    except (OSError, SafetensorError, TypeError, ValueError) as error:  # tools can hold what JSON has not
        raise FastAVError(f"cannot write {path}: {reason_of(error)}") from None


def load(
    path: Path, identity: Mapping[str, str], compiled: CompiledPlan, device: torch.device
) -> tuple[Mapping[str, Any], tuple[Any, ...], Mapping[str, Tensor]]:
    """The fields, the cache's layers and the tensors of a file.

    Raises: FastAVError if it cannot be read, or is of another model, dtype or plan.
    """
    try:
        with safe_open(path, "pt", device="cpu") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()} if header else {}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise FastAVError(f"cannot read {path}: {reason_of(error)}", "give a file that chat.save wrote") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise FastAVError(f"{path} is no conversation of this version of fastav", "give a file that chat.save wrote")
    for name, value in identity.items():
        if header.get(name) != value:
            raise FastAVError(
                f"{path} is a conversation with the {name} {header.get(name)!r}, not {value!r}",
                "resume it with the model, weights, dtype and plan that it was saved with",
            )
    empty: Any = DynamicCache(config=compiled.config)
    tokens = {name.removeprefix("tokens."): value for name, value in tensors.items() if name.startswith("tokens.")}
    try:
        layers = [_layer(index, kind, tensors, empty, device) for index, kind in enumerate(header["layers"])]
        _ = tokens["input_ids"]
        return header["fields"], tuple(layers), tokens
    except KeyError as error:
        raise FastAVError(f"{path} is damaged: it lacks {error.args[0]!r}", "start a new chat") from None


def _lasting(settings: Any) -> Any:
    """Settings without those that differ from one loading of a model to the next."""
    if not isinstance(settings, Mapping):
        return settings
    passing = ("transformers_version", "dtype", "torch_dtype")
    return {
        name: _lasting(value)
        for name, value in settings.items()
        if not str(name).startswith("_") and name not in passing
    }


def _layer(index: int, kind: Mapping[str, Any], tensors: Mapping[str, Tensor], empty: Any, device: torch.device) -> Any:
    """One layer of the cache."""
    keys, values = (tensors[f"layers.{index}.{name}"].to(device) for name in ("keys", "values"))
    if not kind.get("pruned"):
        layer = empty.layers[index]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = kind["length"]
        return layer
    slots, valid = tensors[f"layers.{index}.slots"].to(device), tensors.get(f"layers.{index}.valid")
    layer = PrunedLayer(
        slots, None if valid is None else valid.to(device), kind["prompt"], kind["owner"], kind["window"]
    )
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.expects_update = keys, values, False
    return layer
