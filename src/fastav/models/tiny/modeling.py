"""The embedded model: VideoLLaMA2's architecture, small."""

from fastav.models.videollama2 import VideoLlama2ForConditionalGeneration


class FastAVTinyForConditionalGeneration(VideoLlama2ForConditionalGeneration):
    """VideoLLaMA2's architecture under its own name, which distinguishes its checkpoints from the released model's."""
