"""VideoLLaMA3, with transformers' classes."""

from fastav.models.video_llama3.adapter import VideoLlama3Adapter

__all__ = ["VideoLlama3Adapter"]
