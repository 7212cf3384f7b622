"""Families that vLLM has no models of: our encoders and processors in front of vLLM's Qwen2.

A family is one file; what they share stands in the modules with an underscore: `_clips` from files to features,
`_renderer` from messages to tokens, `_model` the encoders and the decoder, `_sampling` the penalty of the originals.

A request shows one clip. Its `multi_modal_data` is `{"video": clip}`, shown with its sound if it has any, or
`{"audio": clip}`, heard alone; `clip` is a path, the bytes of a media file, or a `fastav.media.Clip`. The prompt is
what our processor's `prompt` gives. `mm_processor_kwargs={"use": "video"}` says otherwise which tracks are shown.
"""

from typing import Any

from fastav.errors import UnsupportedModel

NAME = "fastav"  # of our renderer, tokenizer and video loader in vLLM's registries
ARCHITECTURES = {  # as checkpoints name them: the class, imported when it is served
    "FastAVTinyForConditionalGeneration": "videollama2:VideoLlama2",
    "FastAVTinyLongForConditionalGeneration": "videollama2:VideoLlama2",
    "VideoLlama2ForConditionalGeneration": "videollama2:VideoLlama2",
    "VideoSALMONN2ForCausalLM": "video_salmonn2:VideoSalmonn2",
    "VideoSalmonn2ForConditionalGeneration": "video_salmonn2:VideoSalmonn2",
    "Videollama2Qwen2ForCausalLM": "videollama2:VideoLlama2",
}


def register() -> None:
    """Make the families known to vLLM; again does nothing."""
    from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP  # pyright: ignore[reportMissingImports]
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY  # pyright: ignore[reportMissingImports]
    from vllm.renderers.registry import RENDERER_REGISTRY  # pyright: ignore[reportMissingImports]
    from vllm.tokenizers.registry import TokenizerRegistry  # pyright: ignore[reportMissingImports]

    import fastav.models.video_salmonn2
    import fastav.models.videollama2  # noqa: F401  (both make their configurations known to transformers)

    if NAME in TokenizerRegistry.tokenizers:
        return
    for architecture, place in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{place}")
        MODELS_CONFIG_MAP[architecture] = Served
    TokenizerRegistry.register(NAME, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(NAME, f"{__name__}._renderer", "ClipRenderer")
    VIDEO_LOADER_REGISTRY.register(NAME)(Undecoded)


class Served:
    """What vLLM asks about the configuration of these models."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Have prompts and media read by us, and let penalties see what the originals' see.

        Raises: UnsupportedModel if vLLM is told to leave the encoders out.
        """
        media, penalty = model_config.multimodal_config, f"{__name__}._sampling:GeneratedPenalty"
        if media is None or not model_config.supports_multimodal_inputs:
            raise UnsupportedModel("this model is served with its encoders", "leave --language-model-only out")
        model_config.tokenizer_mode = NAME
        media.media_io_kwargs = {**(media.media_io_kwargs or {}), "video": {"video_backend": NAME}}
        if penalty not in (others := model_config.logits_processors or []):
            model_config.logits_processors = [penalty, *others]

    @staticmethod
    def verify_and_update_config(config: Any) -> None:
        """Nothing more."""


class Undecoded:
    """Stands where vLLM decodes videos: a clip stays the bytes it came as, which hold its sound too."""

    @classmethod
    def load_bytes(cls, data: bytes, **options: Any) -> tuple[None, dict[str, Any]]:
        """No frames; vLLM keeps the bytes beside them."""
        return None, {}
