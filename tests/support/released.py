"""Processors with the settings of the released checkpoints, offline: only their tokenizers are of bytes.

What a clip becomes does not depend on the words of a tokenizer. Settings are the defaults of transformers' classes
where the release has no others.
"""

from collections.abc import Callable
from typing import Any

from transformers import (
    Gemma3nAudioFeatureExtractor,
    Gemma3nProcessor,
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from fastav.models.video_salmonn2.processing import VideoSalmonn2Processor
from fastav.models.video_salmonn2_plus.processing import VideoSalmonn2PlusProcessor
from fastav.models.videollama2.processing import VideoLlama2Processor
from support.families import qwen2_5_omni, qwen3_omni
from support.families._tiny import byte_tokenizer, template

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SEEN = "<|vision_start|><|video_pad|><|vision_end|>"
PAIRS = {"merge_size": 2, "temporal_patch_size": 2}


def gemma3n() -> ProcessorMixin:
    marks = {"boi_token": "<image>", "eoi_token": "</image>", "boa_token": "<audio>", "eoa_token": "</audio>"}
    return Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(),
        SiglipImageProcessor(size={"height": 768, "width": 768}, do_normalize=False),
        byte_tokenizer(**marks, image_token="<|image|>", audio_token="<|audio|>"),
        chat_template=template(image="<|image|>", audio="<|audio|>"),
    )


def gemma4() -> ProcessorMixin:
    marks = {"boi_token": "<|image>", "eoi_token": "<image|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(),
        byte_tokenizer("<|video|>", **marks, image_token="<|image|>", audio_token="<|audio|>"),
        Gemma4VideoProcessor(),
        chat_template=template(video="<|video|>", audio="<|audio|>"),
    )


def phi4_multimodal() -> ProcessorMixin:
    tokenizer = byte_tokenizer(image_token="<|image|>", audio_token="<|audio|>")
    tokenizer.chat_template = template()
    return Phi4MultimodalProcessor(Phi4MultimodalImageProcessor(), Phi4MultimodalFeatureExtractor(), tokenizer)


def qwen2_5_omni_thinker() -> ProcessorMixin:
    return _omni(Qwen2_5OmniProcessor, qwen2_5_omni.MARKS, patch=14)


def qwen2_5_vl() -> ProcessorMixin:
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(**PAIRS, patch_size=14),
        byte_tokenizer(*VISION),
        Qwen2VLVideoProcessor(**PAIRS, patch_size=14),
        chat_template=template(video=SEEN),
    )


def qwen3_omni_thinker() -> ProcessorMixin:
    return _omni(Qwen3OmniMoeProcessor, qwen3_omni.MARKS, patch=16)


def qwen3_vl() -> ProcessorMixin:
    return Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**PAIRS, patch_size=16),
        byte_tokenizer(*VISION),
        Qwen3VLVideoProcessor(**PAIRS, patch_size=16, size={"shortest_edge": 4_096, "longest_edge": 25_165_824}),
        chat_template=template(video=SEEN),
    )


def video_llama3() -> ProcessorMixin:
    sizes = {"merge_size": 2, "patch_size": 14, "size": {"shortest_edge": 12_544, "longest_edge": 12_845_056}}
    return VideoLlama3Processor(
        VideoLlama3ImageProcessorPil(**sizes),
        byte_tokenizer("<|image_pad|>", "<|video_pad|>"),
        VideoLlama3VideoProcessor(**sizes),
        chat_template=template(video="<|video_pad|>"),
    )


def video_salmonn2() -> ProcessorMixin:
    return VideoSalmonn2Processor(byte_tokenizer())


def video_salmonn2_plus() -> ProcessorMixin:
    marks = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id", "audio_token_id")
    words = [f"<|{mark}|>" for mark in marks]
    tokenizer = byte_tokenizer(*words)
    ids = tokenizer.convert_tokens_to_ids(words)
    return VideoSalmonn2PlusProcessor(tokenizer, scheme=dict(zip(marks, ids, strict=True)))


def videollama2() -> ProcessorMixin:
    return VideoLlama2Processor(byte_tokenizer())


def _omni(kind: Any, marks: dict[str, str], *, patch: int) -> ProcessorMixin:
    start, end = marks["vision_bos_token"], marks["vision_eos_token"]
    return kind(
        Qwen2VLImageProcessorPil(**PAIRS, patch_size=patch),
        Qwen2VLVideoProcessor(**PAIRS, patch_size=patch),
        WhisperFeatureExtractor(feature_size=128, chunk_length=300, return_attention_mask=True),
        byte_tokenizer(**marks),
        chat_template=template(
            video=f"{start}{marks['video_token']}{end}",
            audio=f"{marks['audio_bos_token']}{marks['audio_token']}{marks['audio_eos_token']}",
        ),
    )


RELEASED: dict[str, Callable[[], ProcessorMixin]] = {
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "phi4-multimodal": phi4_multimodal,
    "qwen2-5-omni": qwen2_5_omni_thinker,
    "qwen2-5-vl": qwen2_5_vl,
    "qwen3-omni": qwen3_omni_thinker,
    "qwen3-vl": qwen3_vl,
    "video-llama3": video_llama3,
    "video-salmonn2": video_salmonn2,
    "video-salmonn2-plus": video_salmonn2_plus,
    "videollama2": videollama2,
}
