"""transformers' suite of processors on ours. They have one component, a tokenizer, and read media by themselves."""

import unittest
from pathlib import Path
from typing import Any, ClassVar

from fastav.models.video_salmonn2 import VideoSalmonn2Processor
from fastav.models.video_salmonn2_plus import VideoSalmonn2PlusProcessor
from fastav.models.videollama2 import VideoLlama2Processor
from hf_suite.suite import leaving_out, processing

REFERENCE = Path(__file__).parents[1] / "reference"


class Suite(processing.ProcessorTesterMixin):
    """What our families have in common."""

    folder: ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        cls.model_id: Any = str(REFERENCE / cls.folder)
        super().setUpClass()


SAMPLED = "clips are sampled as the model was trained, from frames or files: there is no do_sample_frames to switch off"
LEFT_OUT = {
    "test_apply_chat_template_assistant_mask": "return_assistant_tokens_mask is refused in words, nothing drops it",
    "test_flat_kwarg_applied_when_modality_dict_lacks_it": SAMPLED,
    "test_model_input_names": SAMPLED,
    "test_processor_from_pretrained_vs_from_components": "how a clip becomes tokens stands in the processor's own file "
    "or in config.json; a tokenizer alone does not tell it",
}


@leaving_out(LEFT_OUT)
class VideoLlama2ProcessorTest(Suite, unittest.TestCase):
    processor_class, folder = VideoLlama2Processor, "videollama2"


@leaving_out(LEFT_OUT)
class VideoSalmonn2ProcessorTest(Suite, unittest.TestCase):
    processor_class, folder = VideoSalmonn2Processor, "video_salmonn2"


TINY = "the release's own defaults are built there, whose placeholders the tiny tokenizer does not hold"


@leaving_out({**LEFT_OUT, "test_subprocessor_defaults_0_text": TINY, "test_tokenizer_decode_defaults": TINY})
class VideoSalmonn2PlusProcessorTest(Suite, unittest.TestCase):
    processor_class, folder = VideoSalmonn2PlusProcessor, "video_salmonn2_plus"
