"""What the configurations of our own families share: the decoder's defaults, and checks of what a checkpoint says."""

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, no_type_check

from transformers import Qwen2Config

from fastav.errors import CheckpointError, UnsupportedModel

SIGLIP_SHAPE: dict[str, Any] = {  # of siglip-so400m-patch14-384
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


@no_type_check  # its __init__ takes any key, unlike its signature
class NativeQwen2Config(Qwen2Config):
    """A Qwen2 decoder of 7B with encoders before it. Defaults are those of both releases that have one.

    video_token_id, audio_token_id: placeholders; by default, with any others of `placeholder_names`, the last rows of
    the embedding, which no tokenizer entry uses.
    """

    placeholder_names = ("audio_token_id", "video_token_id")  # from the last row of the embedding up
    default_theta = 1_000_000.0

    vocab_size: int = 152_064
    hidden_size: int = 3584
    intermediate_size: int = 18_944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    bos_token_id: int | None = 151_643
    eos_token_id: int | list[int] | None = 151_645

    mm_hidden_size: int = 1152
    vision_config: Any = None
    video_token_id: int | None = None
    audio_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for back, name in enumerate(self.placeholder_names, start=1):
            if getattr(self, name) is None:
                setattr(self, name, self.vocab_size - back)
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As transformers' own; `from_dict` also reads what the original keeps in other files of the checkpoint."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))  # `from_dict` needs to know the folder
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def placeholders(self) -> dict[str, int]:
        """The ids of placeholders by their names."""
        return {name: getattr(self, name) for name in self.placeholder_names}


def sub_config(kind: type, given: Any, shape: Mapping[str, Any]) -> Any:
    """The configuration of a part: as given, or made of a mapping (or None), where `shape` holds the defaults."""
    return given if isinstance(given, kind) else kind(**{**shape, **(given or {})})


def refuse_other_kind(written: Mapping[str, Any], model_type: str) -> None:
    """Raise CheckpointError if a config.json as written is another model's."""
    kind = written.get("model_type") or model_type
    if kind != model_type:
        raise CheckpointError(f"this is the configuration of a {kind} model, not of {model_type}")


def refuse_other_values(config: Any, known: Mapping[str, Any], part: str = "") -> None:
    """Raise UnsupportedModel unless these keys have the only value that is built here.  part: put before a key."""
    for key, value in known.items():
        if getattr(config, key) != value:
            raise UnsupportedModel(f"{part}{key} must be {value!r}, got {getattr(config, key)!r}")


def mlp_depth(config: Any, key: str) -> int:
    """How many linear layers the projector of this type has.  Raises: UnsupportedModel for another kind."""
    kind = getattr(config, key)
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if depth is None:
        raise UnsupportedModel(f"{key} must be 'mlp<n>x_gelu', got {kind!r}")
    return int(depth[1])


def from_fields(kind: Any, key: str, given: Mapping[str, Any]) -> Any:
    """The dataclass `kind`, made of the mapping under this key of a configuration.

    Raises: CheckpointError for unknown keys.
    """
    unknown = set(given) - {field.name for field in fields(kind)}
    if unknown:
        raise CheckpointError(f"{key} has unknown keys: {', '.join(sorted(unknown))}")
    return kind(**given)
