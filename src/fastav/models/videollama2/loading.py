"""Loading that accounts for every key: what the file lacks is read elsewhere or is an error, never random."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, SiglipVisionModel

from fastav.errors import CheckpointError, reason_of
from fastav.models._checkpoint import refuse, refuse_differences
from fastav.models.videollama2.configuration import vision_places

VISION = "vision_tower.vision_tower.vision_model."
SHARED = ".self_attn.relative_attention_bias.weight"


def complete(model: PreTrainedModel, info: dict[str, Any], source: str) -> None:
    """Fill in what a sound checkpoint may leave out, then refuse any difference.

    It may leave out all of SigLIP (the original loads it from `mm_vision_tower`) and all but one copy of the table of
    BEATs' relative positions (one shared module in the original). `info`: as `output_loading_info` gives it.
    Raises: CheckpointError naming keys.
    """
    missing = set(info["missing_keys"])
    missing -= _copy_shared(model, missing)
    vision = {name for name in model.state_dict() if VISION in name}
    if vision and vision <= missing:
        _load_vision(model, source)
        missing -= vision
    info["missing_keys"] = missing
    refuse_differences(info, source)


def _copy_shared(model: PreTrainedModel, missing: set[str]) -> set[str]:
    tables = {name: value for name, value in model.named_parameters() if name.endswith(SHARED)}
    stored = [value for name, value in tables.items() if name not in missing]
    absent = tables.keys() & missing
    if not stored:
        return set()
    with torch.no_grad():
        for name in absent:
            tables[name].copy_(stored[0])
    return absent


def _load_vision(model: PreTrainedModel, source: str) -> None:
    tower: str = model.config.mm_vision_tower
    base: Any = model.base_model
    target = base.get_submodule(VISION.removesuffix("."))
    errors = []
    for place, options in vision_places(tower, source):
        try:
            loaded: Any = SiglipVisionModel.from_pretrained(
                place, dtype=model.dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except (OSError, ValueError) as error:
            errors.append(reason_of(error))
            continue
        vision, info = loaded
        refuse("lacks", sorted(info["missing_keys"]), place)
        refuse("has other shapes for", sorted(str(key[0]) for key in info["mismatched_keys"]), place)
        _copy_module(vision, target, place)
        return
    raise CheckpointError(
        f"{source} holds no SigLIP weights, and its vision tower {tower!r} cannot be read: {'; '.join(errors)}",
        "put SigLIP's folder inside the checkpoint's, under that name",
    )


def _copy_module(source: nn.Module, target: nn.Module, place: str) -> None:
    state, wanted = source.state_dict(), target.state_dict()
    other = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
    refuse("has other shapes for", other, place)
    target.load_state_dict(state)
