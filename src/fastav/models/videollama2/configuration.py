"""The configuration of VideoLLaMA2.1-7B-AV, under the key names of the original."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, no_type_check

from transformers import SiglipVisionConfig

from fastav.errors import CheckpointError
from fastav.models._native_configuration import (
    SIGLIP_SHAPE,
    NativeQwen2Config,
    from_fields,
    refuse_other_kind,
    refuse_other_values,
    sub_config,
)
from fastav.models.videollama2.scheme import MOST_FRAMES, Scheme

SIGLIP = "siglip-so400m-patch14-384"


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatsShape:
    """The dimensions of BEATs, which the original hard-wires. The names are those of the BEATs checkpoint."""

    embed_dim: int = 512
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    input_patch_size: int = 16
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    predictor_class: int = 527


@no_type_check  # its __init__ takes any key, unlike its signature
class VideoLlama2Config(NativeQwen2Config):
    """VideoLLaMA2.1-7B-AV: SigLIP, the STC connector, BEATs, an audio projector and a Qwen2 decoder.

    Defaults are those of the release; keys are the original's, but for those it hard-wires: `beats_config` (the fields
    of `BeatsShape`), `vision_config`, `most_frames`, `stc_*`, `audio_*` and `interleaved`. Where `vision_config` is
    absent, as in every original checkpoint, it is read from the folder or hub id that `mm_vision_tower` names.
    num_frames: the original's own default where the key is absent, 8.

    Differs: `image_aspect_ratio` is kept but has no effect, as in the original's inference.
    Raises: UnsupportedModel for a connector or projector of another kind; CheckpointError for an unknown BEATs key.
    """

    model_type = "videollama2_qwen2"
    sub_configs = {"vision_config": SiglipVisionConfig}  # noqa: RUF012 (transformers' own declaration)

    mm_vision_tower: str = f"google/{SIGLIP}"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_projector_type: str = "stc_connector_v35"
    mm_audio_tower: str | None = "audio_tower.bin"
    mm_projector_a_type: str = "mlp2x_gelu"
    mm_hidden_size_a: int = 768
    hidden_size_a: int = 3584
    num_frames: int | None = 8
    image_aspect_ratio: str | None = "pad"

    beats_config: dict[str, int] | None = None
    most_frames: int = MOST_FRAMES
    stc_depth: int = 4
    stc_mlp_depth: int = 2
    audio_seconds: int = 30
    audio_clips: int = 8
    audio_clip_seconds: int = 2
    num_mel_bins: int = 128
    interleaved: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        shape = SIGLIP_SHAPE if self.vision_config is None else {}
        self.vision_config = sub_config(SiglipVisionConfig, self.vision_config, shape)
        self.beats_config = asdict(from_fields(BeatsShape, "beats_config", self.beats_config or {}))
        self.num_frames = 8 if self.num_frames is None else self.num_frames
        super().__post_init__(**kwargs)
        refuse_other_values(self, {"mm_projector_type": "stc_connector_v35", "mm_vision_select_feature": "patch"})

    @property
    def beats(self) -> BeatsShape:
        """The dimensions of BEATs."""
        return BeatsShape(**(self.beats_config or {}))

    @property
    def scheme(self) -> Scheme:
        """How a clip becomes tokens."""
        return Scheme(
            num_frames=self.num_frames or 8,
            most_frames=self.most_frames,
            image_size=self.vision_config.image_size,
            patch_size=self.vision_config.patch_size,
            audio_seconds=self.audio_seconds,
            audio_clips=self.audio_clips,
            clip_seconds=self.audio_clip_seconds,
            mel_bins=self.num_mel_bins,
            audio_patch=self.beats.input_patch_size,
            interleaved=self.interleaved,
            **self.placeholders(),
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own; fills in `vision_config`.

        Raises: CheckpointError if it is another model's, or SigLIP's dimensions cannot be found.
        """
        refuse_other_kind(config_dict, cls.model_type)
        if config_dict.get("vision_config") is None and config_dict.get("mm_vision_tower"):
            root = kwargs.get("name_or_path") or config_dict.get("name_or_path") or ""
            config_dict = {**config_dict, "vision_config": vision_config(config_dict["mm_vision_tower"], str(root))}
        return super().from_dict(config_dict, **kwargs)


def vision_places(tower: str, root: str) -> list[tuple[str, dict[str, Any]]]:
    """Where `mm_vision_tower` may be: arguments of `from_pretrained`, the likeliest first.

    tower: a folder, absolute or inside the checkpoint, or a hub id. root: the checkpoint's folder or hub id.
    """
    for folder in (Path(root) / tower, Path(tower)):
        if folder.is_dir():
            return [(str(folder), {})]
    in_repository = [] if not root or Path(root).is_dir() else [(root, {"subfolder": tower})]
    return [*in_repository, (tower, {})]


def vision_config(tower: str, root: str) -> SiglipVisionConfig:
    """SigLIP's dimensions. Those of the release are known; others are read where `mm_vision_tower` points.

    Raises: CheckpointError if nothing readable is there.
    """
    places = vision_places(tower, root)
    if Path(tower).name == SIGLIP and not Path(places[0][0]).is_dir():
        return SiglipVisionConfig(**SIGLIP_SHAPE)
    for place, options in places:
        try:
            return SiglipVisionConfig.from_pretrained(place, **options)
        except (OSError, ValueError):
            continue
    raise CheckpointError(
        f"the vision tower {tower!r} of {root or 'the configuration'} is neither a folder nor a reachable hub id",
        "put SigLIP's folder inside the checkpoint's, or write its dimensions as vision_config into config.json",
    )
