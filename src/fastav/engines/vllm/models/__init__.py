"""Families that vLLM has no models of: our encoders and processors in front of vLLM's Qwen2.

A family is one file. Modules with an underscore are shared: `_clips` (from files to features), `_renderer` (from
messages to token ids), `_model` (encoders and decoder), `_sampling` (the originals' repetition penalty).

A request takes one clip. Its `multi_modal_data` is `{"video": clip}`, with its sound if it has any, or
`{"audio": clip}` for the sound alone; `clip` is a path, the bytes of a media file, or a `fastav.media.Clip`. The prompt
is that of our processor's method `prompt`. `mm_processor_kwargs={"use": "video"}` selects other tracks.
"""

from typing import Any

from fastav.engines.vllm import compat
from fastav.errors import UnsupportedModel

NAME = "fastav"  # of our renderer, tokenizer and video loader in vLLM's registries
ARCHITECTURES = {  # as checkpoints name them: module and class, imported when the model is served
    "FastAVTinyForConditionalGeneration": "videollama2:VideoLlama2",
    "FastAVTinyLongForConditionalGeneration": "videollama2:VideoLlama2",
    "VideoLlama2ForConditionalGeneration": "videollama2:VideoLlama2",
    "VideoSALMONN2ForCausalLM": "video_salmonn2:VideoSalmonn2",
    "VideoSalmonn2ForConditionalGeneration": "video_salmonn2:VideoSalmonn2",
    "Videollama2Qwen2ForCausalLM": "videollama2:VideoLlama2",
}


def register() -> None:
    """Register the families with vLLM; a second call does nothing."""
    import fastav.models.video_salmonn2
    import fastav.models.videollama2  # noqa: F401  (both register their configurations with transformers)

    if NAME in compat.TokenizerRegistry.tokenizers:
        return
    for architecture, target in ARCHITECTURES.items():
        compat.ModelRegistry.register_model(architecture, f"{__name__}.{target}")
        compat.MODELS_CONFIG_MAP[architecture] = ConfigHook
    compat.TokenizerRegistry.register(NAME, *compat.HF_TOKENIZER)
    compat.RENDERER_REGISTRY.register(NAME, f"{__name__}._renderer", "ClipRenderer")
    compat.VIDEO_LOADER_REGISTRY.register(NAME)(BytesLoader)


class ConfigHook:
    """vLLM's hook into the configuration of these models."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Set our renderer and video loader.

        Raises: UnsupportedModel if vLLM is configured to leave the encoders out.
        """
        media = model_config.multimodal_config
        if media is None or not model_config.supports_multimodal_inputs:
            raise UnsupportedModel("this model needs its encoders", "leave --language-model-only out")
        model_config.tokenizer_mode = NAME
        media.media_io_kwargs = {**(media.media_io_kwargs or {}), "video": {"video_backend": NAME}}

    @staticmethod
    def verify_and_update_config(config: Any) -> None:
        """Set our repetition penalty, by the interface of the model runner."""
        penalty = "GeneratedPenaltyV2" if config.use_v2_model_runner else "GeneratedPenaltyV1"
        target, model_config = f"{__name__}._sampling:{penalty}", config.model_config
        if target not in (others := model_config.logits_processors or []):
            model_config.logits_processors = [target, *others]


class BytesLoader:
    """A video loader for vLLM that decodes nothing: a clip keeps the bytes of its file, which contain its sound too."""

    @classmethod
    def load_bytes(cls, data: bytes, **options: Any) -> tuple[None, dict[str, Any]]:
        """No frames; vLLM keeps the bytes with them."""
        return None, {}
