"""The configuration of video-SALMONN 2, under the key names of the original."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, no_type_check

from transformers import SiglipVisionConfig, WhisperConfig

from fastav.models._native_configuration import (
    SIGLIP_SHAPE,
    NativeQwen2Config,
    from_fields,
    mlp_depth,
    refuse_other_kind,
    refuse_other_values,
    sub_config,
)
from fastav.models.video_salmonn2.scheme import Scheme

AUX = "aux_config.json"
WHISPER_SHAPE: dict[str, Any] = {  # of whisper-large-v3
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}
STATED = (  # what the original takes from its command line; kept beside the weights or under `model_args`
    "num_speech_query_token",
    "second_per_window",
    "second_stride",
    "use_final_linear",
    "add_time_token",
    "video_fps",
)
KNOWN = {  # what the original's scripts set whenever they run, and the one value that is built here
    "mm_spatial_pool_mode": "max",
    "mm_pooling_position": "after",
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QFormerShape:
    """The dimensions of the Q-Former, which the original takes from `bert-base-uncased` or hard-wires."""

    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_hidden_layers: int = 2
    layer_norm_eps: float = 1e-12


@no_type_check  # its __init__ takes any key, unlike its signature
class VideoSalmonn2Config(NativeQwen2Config):
    """video-SALMONN 2: SigLIP, a projector, Whisper's encoder, a window Q-Former and a Qwen2 decoder.

    Defaults are those of the release. Keys are the original's, but for what it hard-wires or takes from elsewhere:
    `vision_config` (SigLIP's layers that are there: one fewer than in the hub's), `speech_config` (Whisper),
    `qformer_config` (the fields of `QFormerShape`), and the arguments of its scripts from `num_speech_query_token` on.
    Where they are absent, as in every original checkpoint, they are read from `aux_config.json` beside it, if there is
    one, then from `model_args`; otherwise they are the release's.
    blank_token_id: a placeholder like the others.

    What the original's scripts overwrite when they run (pooling, newlines) is read from `model_args` only: elsewhere
    it may be stale. `rope_scaling` has no effect, as in the original.
    Raises: UnsupportedModel for parts of another kind; CheckpointError for an unknown key of the Q-Former.
    """

    model_type = "video_salmonn_2"
    sub_configs = {"vision_config": SiglipVisionConfig, "speech_config": WhisperConfig}  # noqa: RUF012 (transformers')
    placeholder_names = ("audio_token_id", "video_token_id", "blank_token_id")

    mm_vision_tower: str = "google/siglip-so400m-patch14-384"
    mm_projector_type: str = "mlp2x_gelu"
    mm_spatial_pool_mode: str = "max"
    mm_spatial_pool_stride: int = 2
    mm_pooling_position: str = "after"
    mm_newline_position: str = "grid"
    mm_patch_merge_type: str = "spatial_unpad"
    add_time_token: bool = True

    num_speech_query_token: int = 1
    second_per_window: float | int = 0.5
    second_stride: float | int = 0.5
    use_final_linear: bool = True
    video_fps: float | int = 1
    max_time: float | int = 110

    speech_config: Any = None
    qformer_config: dict[str, Any] | None = None
    blank_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        siglip = SIGLIP_SHAPE | {"num_hidden_layers": 26, "vision_use_head": False}  # without its last layer
        self.vision_config = sub_config(SiglipVisionConfig, self.vision_config, siglip)
        self.speech_config = sub_config(WhisperConfig, self.speech_config, WHISPER_SHAPE)
        self.qformer_config = asdict(from_fields(QFormerShape, "qformer_config", self.qformer_config or {}))
        super().__post_init__(**kwargs)
        refuse_other_values(self, KNOWN)
        mlp_depth(self, "mm_projector_type")

    @property
    def qformer(self) -> QFormerShape:
        """The dimensions of the Q-Former."""
        return QFormerShape(**(self.qformer_config or {}))

    @property
    def scheme(self) -> Scheme:
        """How a clip becomes tokens."""
        return Scheme(
            video_fps=self.video_fps,
            max_time=self.max_time,
            image_size=self.vision_config.image_size,
            patch_size=self.vision_config.patch_size,
            pool_stride=self.mm_spatial_pool_stride,
            mel_bins=self.speech_config.num_mel_bins,
            audio_positions=self.speech_config.max_source_positions,
            second_per_window=self.second_per_window,
            second_stride=self.second_stride,
            query_tokens=self.num_speech_query_token,
            time_tokens=self.add_time_token,
            **self.placeholders(),
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own; fills in what the original keeps elsewhere.

        Raises: CheckpointError if it is another model's.
        """
        refuse_other_kind(config_dict, cls.model_type)
        path = Path(str(kwargs.get("name_or_path") or config_dict.get("name_or_path") or ""), AUX)
        aux = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return super().from_dict(gather(config_dict, aux), **kwargs)


def gather(written: dict[str, Any], aux: dict[str, Any]) -> dict[str, Any]:
    """An original's config.json as written, with what stands in `aux_config.json` and under `model_args` filled in."""
    arguments = dict(written.get("model_args") or {})
    if "fps" in arguments:
        arguments.setdefault("video_fps", arguments["fps"])
    gathered: dict[str, Any] = {key: part[key] for part in (arguments, aux) for key in STATED if key in part}
    if siglip := aux.get("siglip"):
        kept = aux.get("siglip_layers_kept", siglip["num_hidden_layers"] - 1)
        gathered["vision_config"] = siglip | {"num_hidden_layers": kept}
    if whisper := aux.get("whisper"):
        gathered["speech_config"] = whisper
    if "qformer" in aux or "qformer_layer_norm_eps" in aux:
        eps = {"layer_norm_eps": aux["qformer_layer_norm_eps"]} if "qformer_layer_norm_eps" in aux else {}
        gathered["qformer_config"] = aux.get("qformer", {}) | eps
    current = {key: arguments.get(key, known) for key, known in KNOWN.items()}
    if "mm_spatial_pool_stride" in arguments:
        current["mm_spatial_pool_stride"] = arguments["mm_spatial_pool_stride"]
    return gathered | written | current | {"rope_scaling": None}
