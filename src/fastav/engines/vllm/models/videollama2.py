"""VideoLLaMA2.1-7B-AV inside vLLM, and the embedded models, which are of its architecture."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from fastav.engines.vllm.compat import MULTIMODAL_REGISTRY
from fastav.engines.vllm.models._clips import ClipDummies, ClipInfo, ClipProcessing
from fastav.engines.vllm.models._model import ClipModel, Features
from fastav.messages import Media
from fastav.models.videollama2 import VideoLlama2Processor
from fastav.models.videollama2.modeling import VideoLlama2RotaryEmbedding


class VideoLlama2Info(ClipInfo):
    """Names the processor."""

    processor_class = VideoLlama2Processor


class VideoLlama2Processing(ClipProcessing):
    """Clips with the tokens of the frames first, then those of the sound."""

    def encode(self, processor: Any, media: Media, placeholder: str) -> BatchFeature:
        """See `ClipProcessing`."""
        return processor(placeholder, **processor.media_arguments([processor.read(media)]))


@MULTIMODAL_REGISTRY.register_processor(VideoLlama2Processing, info=VideoLlama2Info, dummy_inputs=ClipDummies)
class VideoLlama2(ClipModel):
    """SigLIP and BEATs in front of Qwen2."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        layers = self.language_model.model.layers
        rotary = deepcopy(layers[0].self_attn.rotary_emb)  # vLLM's own is shared with other models of this process
        rotary.cos_sin_cache.copy_(rotary_tables(self.config, len(rotary.cos_sin_cache)))
        for layer in layers:
            layer.self_attn.rotary_emb = rotary

    def encode(self, features: Features) -> Mapping[int, Tensor]:
        """See `ClipModel`."""
        model: Any = self.encoders.get_decoder()
        embeddings = {}
        if "pixel_values_videos" in features:
            video = model.get_video_features(features["pixel_values_videos"])
            embeddings[self.config.video_token_id] = video.pooler_output.flatten(0, 1)
        if "input_features" in features:
            audio = model.get_audio_features(features["input_features"])
            embeddings[self.config.audio_token_id] = audio.pooler_output.flatten(0, 1)
        return embeddings


def rotary_tables(config: Any, length: int) -> Tensor:
    """Cosines and sines [positions, head], rounded as in the original: half a head of each, concatenated."""
    rotary = VideoLlama2RotaryEmbedding(config)
    cosine, sine = (table[0] for table in rotary(torch.ones(1), torch.arange(length)[None]))
    return torch.cat([cosine.chunk(2, -1)[0], sine.chunk(2, -1)[0]], -1)
