"""VideoLLaMA2.1-7B-AV inside vLLM, and the embedded models, which are of its architecture."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.multimodal import MULTIMODAL_REGISTRY  # pyright: ignore[reportMissingImports]

from fastav.adapter import Request
from fastav.engines.vllm.families._clips import ClipDummies, ClipInfo, ClipProcessing
from fastav.engines.vllm.families._model import ClipModel, Item
from fastav.models.videollama2 import VideoLlama2Processor
from fastav.models.videollama2.modeling import VideoLlama2RotaryEmbedding


class VideoLlama2Info(ClipInfo):
    """Its processor."""

    processor_class = VideoLlama2Processor


class VideoLlama2Processing(ClipProcessing):
    """Its clips: the tokens of the frames, then those of the sound."""

    def encoded(self, processor: Any, request: Request, place: str) -> BatchFeature:
        """See `ClipProcessing`."""
        return processor(place, **processor.media_arguments([processor.read(request)]))


@MULTIMODAL_REGISTRY.register_processor(VideoLlama2Processing, info=VideoLlama2Info, dummy_inputs=ClipDummies)
class VideoLlama2(ClipModel):
    """SigLIP and BEATs in front of Qwen2."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        layers = self.language_model.model.layers
        rotary = deepcopy(layers[0].self_attn.rotary_emb)  # vLLM's own is shared with other models of this process
        rotary.cos_sin_cache.copy_(tables(self.config, len(rotary.cos_sin_cache)))
        for layer in layers:
            layer.self_attn.rotary_emb = rotary

    def encode(self, item: Item) -> Mapping[int, Tensor]:
        """See `ClipModel`."""
        model: Any = self.encoders.get_decoder()
        found = {}
        if "pixel_values_videos" in item:
            seen = model.get_video_features(item["pixel_values_videos"])
            found[self.config.video_token_id] = seen.pooler_output.flatten(0, 1)
        if "input_features" in item:
            heard = model.get_audio_features(item["input_features"])
            found[self.config.audio_token_id] = heard.pooler_output.flatten(0, 1)
        return found


def tables(config: Any, length: int) -> Tensor:
    """Cosines and sines [positions, head] as the original rounds them, halves of each beside one another."""
    rotary = VideoLlama2RotaryEmbedding(config)
    cosine, sine = (table[0] for table in rotary(torch.ones(1), torch.arange(length)[None]))
    return torch.cat([cosine.chunk(2, -1)[0], sine.chunk(2, -1)[0]], -1)
