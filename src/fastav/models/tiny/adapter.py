"""What the rest of fastav must know about the model that comes with it."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any, ClassVar

from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from fastav.models._checkpoint import load
from fastav.models.tiny.modeling import FastAVTinyForConditionalGeneration
from fastav.models.videollama2 import VideoLlama2Adapter, VideoLlama2Config, VideoLlama2Processor
from fastav.plan import Keep, Plan, Share
from fastav.presets import fastav, plus, trim


class TinyAdapter(VideoLlama2Adapter):
    """VideoLLaMA2's architecture at three million parameters, trained on the toy world; its weights are in the package.

    The paper has no settings for it. As for VideoLLaMA2, all video stays at the global cut and of the audio the
    beginning, but half of it: there a clip's last seconds are padding, here they may hold a beep.
    """

    name = "tiny"
    architectures = frozenset({FastAVTinyForConditionalGeneration.__name__})
    checkpoint = str(files("fastav") / "assets" / "tiny")
    presets: ClassVar[Mapping[str, Plan]] = {
        "fastav": fastav(Keep(audio=Share(0.5))),
        "fastav-plus": plus(),
        "fastav-trim": trim(),
    }
    prefix = 1
    model: ClassVar[type[FastAVTinyForConditionalGeneration]] = FastAVTinyForConditionalGeneration

    def config(self, source: str | None = None) -> VideoLlama2Config:
        """The configuration in a local folder or hub id; of the model in the package if None."""
        return super().config(self.checkpoint if source is None else source)

    def load(self, source: str, **options: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Model (in evaluation mode) and processor from a local folder or a hub id.

        Raises: CheckpointError if keys are missing, left over, or of another shape, or files cannot be read.
        """
        return load(
            source,
            options,
            config=VideoLlama2Config,
            processor=VideoLlama2Processor,
            model=self.model,
        )

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of this configuration whose weights are not loaded."""
        assert isinstance(config, VideoLlama2Config)
        return self.model(config)
