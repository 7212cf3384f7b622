"""transformers' suite of models on ours, tiny and random."""

import inspect
import unittest
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

from fastav.models.video_salmonn2 import (
    VideoSalmonn2Config,
    VideoSalmonn2ForConditionalGeneration,
)
from fastav.models.video_salmonn2_plus import (
    VideoSalmonn2PlusConfig,
    VideoSalmonn2PlusForConditionalGeneration,
    VideoSalmonn2PlusModel,
)
from fastav.models.videollama2 import VideoLlama2Config, VideoLlama2ForConditionalGeneration, VideoLlama2Model
from hf_suite.suite import leaving_out, modeling

REFERENCE = Path(__file__).parents[1] / "reference"
LAYERS = {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # the suite shortens the table of embeddings, and lengthens batches with ids below 5
    "video_token_id": 5,
    "audio_token_id": 6,
}


class Tester(ABC):
    """What the suite asks of a family: a tiny configuration, and inputs of its `forward`."""

    family: ClassVar[type[PreTrainedConfig]]
    folder: ClassVar[str]
    changes: ClassVar[dict[str, Any]]
    encoder_layers: ClassVar[tuple[int, int]]  # of pictures and of sound, of those that are computed
    batch_size, is_training = 3, True
    text = 6  # tokens on each side of the clip

    def __init__(self, parent: unittest.TestCase, *, media: bool = True) -> None:
        self.parent, self.media = parent, media
        config: Any = self.get_config()
        text = config.get_text_config(decoder=True)
        self.hidden_size, self.num_hidden_layers = text.hidden_size, text.num_hidden_layers
        self.num_attention_heads, self.vocab_size = text.num_attention_heads, text.vocab_size
        self.seq_length = self.prepare_config_and_inputs_for_common()[1]["input_ids"].shape[1]
        self.encoder_seq_length = self.key_length = self.seq_length

    def get_config(self) -> Any:
        config = self.family.from_pretrained(REFERENCE / self.folder, **self.changes)
        text = config.get_text_config(decoder=True)
        for name, value in LAYERS.items():
            setattr(text, name, value)
        config.architectures = config.dtype = None  # as in what is made, not read
        return config

    @abstractmethod
    def clip(self, config: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
        """A clip's ids, and the media of a batch."""

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config = self.get_config()
        run, media = self.clip(config) if self.media else ([], {})
        sides = torch.randint(9, 100, (2, self.batch_size, self.text))
        ids = torch.cat([sides[0], torch.tensor(run, dtype=torch.long).expand(self.batch_size, -1), sides[1]], dim=1)
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}


class VideoLlama2Tester(Tester):
    family, folder = VideoLlama2Config, "videollama2"
    encoder_layers = (2, 2)
    changes: ClassVar[dict[str, Any]] = {**LAYERS, "num_frames": 2, "audio_seconds": 1}

    def clip(self, config: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
        scheme, side = config.scheme, config.vision_config.image_size
        run = [scheme.video_token_id] * scheme.video_tokens(2) + [scheme.audio_token_id] * scheme.audio_tokens
        return run, {
            "pixel_values_videos": torch.rand(self.batch_size, 2, 3, side, side),
            "input_features": torch.randn(self.batch_size, scheme.fbank_rows, scheme.mel_bins),
            "feature_attention_mask": torch.ones(self.batch_size, scheme.fbank_rows, dtype=torch.bool),
        }


class VideoSalmonn2Tester(Tester):
    family, folder = VideoSalmonn2Config, "video_salmonn2"
    encoder_layers = (3, 2)
    changes: ClassVar[dict[str, Any]] = {**LAYERS, "blank_token_id": 7}

    def clip(self, config: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
        scheme, side = config.scheme, config.vision_config.image_size
        run = [scheme.video_token_id] * scheme.frame_tokens + [scheme.audio_token_id] * scheme.piece_tokens
        return run, {
            "pixel_values_videos": torch.rand(self.batch_size, 3, side, side),
            "input_features": torch.randn(self.batch_size, scheme.mel_bins, 3000),
            "piece_index": torch.zeros(self.batch_size, dtype=torch.long),
        }


class VideoSalmonn2PlusTester(Tester):
    family, folder = VideoSalmonn2PlusConfig, "video_salmonn2_plus"
    encoder_layers = (4, 2)
    changes: ClassVar[dict[str, Any]] = {**LAYERS, "vision_start_token_id": 7, "vision_end_token_id": 8}

    def clip(self, config: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
        scheme = config.scheme
        run = [scheme.video_token_id] * 4 + [scheme.audio_token_id] * 60
        values = 3 * scheme.temporal * scheme.patch_size**2
        return [scheme.vision_start_token_id, *run, scheme.vision_end_token_id], {
            "pixel_values_videos": torch.randn(self.batch_size * 16, values),
            "video_grid_thw": torch.tensor([[1, 4, 4]] * self.batch_size),
            "input_features": torch.randn(self.batch_size, scheme.mel_bins, 3000),
        }


class Suite(modeling.ModelTesterMixin, modeling.GenerationTesterMixin):
    """What our families have in common."""

    family: ClassVar[type[Tester]]
    audio_names: ClassVar[tuple[str, ...]] = ("input_features",)
    video_names: ClassVar[tuple[str, ...]] = ("pixel_values_videos",)
    test_all_params_have_gradient = False  # checkpoints hold layers that are not computed
    _is_composite = True

    skip_test_audio_features_output_shape = skip_test_video_features_output_shape = (
        True  # widths of other configurations
    )

    def setUp(self) -> None:
        # these repeat and lengthen batches of ids, which a clip's places among them do not survive
        media = not self._testMethodName.startswith("test_eager_matches_sdpa_inference")
        self.model_tester = self.family(self, media=media)
        if self._testMethodName.startswith("test_training"):
            self.all_model_classes = self.all_model_classes[-1:]  # base models have no loss

    def _prepare_for_class(self, inputs_dict: Any, model_class: Any, return_labels: bool = False) -> Any:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and "labels" in inspect.signature(model_class.forward).parameters:
            inputs["labels"] = inputs["input_ids"].clone()  # the suite knows only transformers' own heads
        return inputs

    def _only(self, names: tuple[str, ...]) -> tuple[Any, dict[str, torch.Tensor]]:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {name: inputs[name] for name in names}

    def _video_features_get_expected_num_attentions(self, model_tester: Any = None) -> int:
        return self.family.encoder_layers[0]

    def _audio_features_get_expected_num_attentions(self, model_tester: Any = None) -> int:
        return self.family.encoder_layers[1]

    def _video_features_prepare_config_and_inputs(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self._only(self.video_names)

    def _audio_features_prepare_config_and_inputs(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self._only(self.audio_names)


STRICT = "loading is strict: where weights are missing there is a CheckpointError, and none are drawn by chance"


@leaving_out(
    {"test_correct_missing_keys": STRICT, "test_model_weights_reload_no_missing_tied_weights": STRICT},
)
class VideoLlama2SuiteTest(Suite, unittest.TestCase):
    family = VideoLlama2Tester
    all_model_classes = (VideoLlama2Model, VideoLlama2ForConditionalGeneration)


@leaving_out(
    {"test_correct_missing_keys": STRICT, "test_model_weights_reload_no_missing_tied_weights": STRICT},
)
class VideoSalmonn2SuiteTest(Suite, unittest.TestCase):
    family = VideoSalmonn2Tester
    all_model_classes = (VideoSalmonn2ForConditionalGeneration,)


@leaving_out(
    {
        "test_model_weights_reload_no_missing_tied_weights": STRICT,
        "test_model_base_model_prefix": "the original's checkpoints name encoders and decoder alike with and without a "
        "head, so the whole model extends the base model and does not hold it",
    },
)
class VideoSalmonn2PlusSuiteTest(Suite, unittest.TestCase):
    family = VideoSalmonn2PlusTester
    all_model_classes = (VideoSalmonn2PlusModel, VideoSalmonn2PlusForConditionalGeneration)
    video_names = ("pixel_values_videos", "video_grid_thw")
