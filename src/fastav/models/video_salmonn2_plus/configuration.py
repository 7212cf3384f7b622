"""The configuration of video-SALMONN 2+, under the key names of the original."""

import os
from dataclasses import asdict, dataclass, fields
from typing import Any, no_type_check

from transformers import Qwen2_5_VLConfig, WhisperConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from fastav.errors import UnsupportedModel
from fastav.models._native_configuration import refuse_other_kind, refuse_other_values
from fastav.models.video_salmonn2_plus.scheme import TOKENS_PER_SECOND, Scheme

ORIGINAL_TYPE = "qwen2_5_vl"  # what the original's config.json says, though stock Qwen2.5-VL takes no sound
TEXT: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128_000,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
}
VISION: dict[str, Any] = {"hidden_size": 1280, "tokens_per_second": TOKENS_PER_SECOND}


@dataclass(frozen=True, slots=True, kw_only=True)
class QFormerShape:
    """The dimensions of the Q-Former. The names are those of BERT's configuration, with which the original writes it.

    encoder_width: of the speech features. cross_attention_freq: every such layer reads them, the first one among them.
    query_length: tokens of a window.
    """

    hidden_size: int = 3072
    num_hidden_layers: int = 2
    num_attention_heads: int = 12
    intermediate_size: int = 12_288
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    encoder_width: int = 1280
    cross_attention_freq: int = 1
    query_length: int = 1


@no_type_check  # its __init__ takes any key, unlike its signature
class VideoSalmonn2PlusAudioConfig(WhisperConfig):
    """Whisper-large-v3's encoder and the Q-Former after it.

    qformer_config: keys of `QFormerShape` among any others of BERT's; `out_hidden_size` there has no effect, since it
    is the decoder's. second_per_window, second_stride: both must be half a second, as in the release.

    Raises: UnsupportedModel for windows of another length, or of more than one token.
    """

    base_config_key = "audio_config"

    d_model: int = 1280
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    num_mel_bins: int = 128
    qformer_config: dict[str, Any] | None = None
    second_per_window: float = 0.5
    second_stride: float = 0.5

    def __post_init__(self, **kwargs: Any) -> None:
        self.qformer_config = asdict(QFormerShape()) | (self.qformer_config or {})
        super().__post_init__(**kwargs)
        refuse_other_values(self, {"second_per_window": 0.5, "second_stride": 0.5}, "audio_config.")
        if self.qformer.query_length != 1:
            raise UnsupportedModel(f"qformer_config.query_length must be 1, got {self.qformer.query_length}")

    @property
    def qformer(self) -> QFormerShape:
        """The dimensions of the Q-Former."""
        known = {field.name for field in fields(QFormerShape)}
        return QFormerShape(**{key: value for key, value in (self.qformer_config or {}).items() if key in known})


@no_type_check  # its __init__ takes any key, unlike its signature
class VideoSalmonn2PlusConfig(Qwen2_5_VLConfig):
    """video-SALMONN 2+: Qwen2.5-VL with Whisper's encoder and a Q-Former for sound.

    Defaults are those of the released 7B; keys are the original's. Its config.json says `qwen2_5_vl` and lacks the
    settings of its scripts: `frame_seconds`, `min_frames`, `max_frames`, `frame_pixels`, `positions` (see `Scheme`).

    Raises: CheckpointError for another model's configuration; UnsupportedModel for an audio part of another kind.
    """

    model_type = "video_salmonn2_plus"
    placeholder_names = ("audio_token_id", "video_token_id")
    sub_configs = {  # noqa: RUF012 (transformers' own declaration)
        "vision_config": Qwen2_5_VLVisionConfig,
        "text_config": Qwen2_5_VLTextConfig,
        "audio_config": VideoSalmonn2PlusAudioConfig,
    }

    text_config: Any = None
    vision_config: Any = None
    audio_config: Any = None
    audio_token_id: int = 151_665
    frame_seconds: float = 0.1
    min_frames: int = 16
    max_frames: int = 768
    frame_pixels: int = 61_250
    positions: str = "script"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            kwargs = TEXT | kwargs
        if self.vision_config is None:
            self.vision_config = dict(VISION)
        if self.audio_config is None:
            self.audio_config = VideoSalmonn2PlusAudioConfig()
        elif isinstance(self.audio_config, dict):
            self.audio_config = VideoSalmonn2PlusAudioConfig(**self.audio_config)
        super().__post_init__(**kwargs)
        _ = self.scheme  # refuses unknown settings

    @property
    def scheme(self) -> Scheme:
        """How a clip becomes tokens."""
        return Scheme(
            frame_seconds=self.frame_seconds,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            frame_pixels=self.frame_pixels,
            patch_size=self.vision_config.patch_size,
            merge=self.vision_config.spatial_merge_size,
            temporal=self.vision_config.temporal_patch_size,
            mel_bins=self.audio_config.num_mel_bins,
            positions=self.positions,
            vision_start_token_id=self.vision_start_token_id,
            vision_end_token_id=self.vision_end_token_id,
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            audio_token_id=self.audio_token_id,
        )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers' own, under our type."""
        written, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _under_our_type(written), rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own.

        Raises: CheckpointError if it is another model's, for example a Qwen2.5-VL without an audio encoder.
        """
        config_dict = _under_our_type(config_dict)
        refuse_other_kind(config_dict, cls.model_type)
        return super().from_dict(config_dict, **kwargs)


def _under_our_type(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("model_type") == ORIGINAL_TYPE and "audio_config" in config:
        return config | {"model_type": VideoSalmonn2PlusConfig.model_type}
    return config
