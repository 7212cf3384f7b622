"""video-SALMONN 2's computation, apart from what the original's arrays show."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from fastav.models._qformer import QFormer
from fastav.models.video_salmonn2 import (
    QFormerShape,
    VideoSalmonn2Config,
    VideoSalmonn2ForConditionalGeneration,
    VideoSalmonn2Processor,
)
from fastav.models.video_salmonn2.modeling import piece_marks
from support.native import ALONE, ROWS, generated, inputs_of
from support.native import VIDEO_SALMONN2 as FAMILY


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILY.model()


@pytest.fixture(scope="module")
def processor() -> Any:
    return FAMILY.processor()


def test_sound_whose_order_is_not_given_is_repeated_too(model: Any, processor: Any) -> None:
    inputs = inputs_of(FAMILY, processor, ALONE)
    plain = {name: value for name, value in inputs.items() if name not in ("audio_index", "piece_index")}
    assert generated(model, plain, num_beams=2).tolist() == generated(model, inputs, num_beams=2).tolist()


def test_eager_attention_gives_the_same(model: Any, processor: Any) -> None:
    inputs = inputs_of(FAMILY, processor, *ROWS[FAMILY.name])
    before = model.config._attn_implementation
    assert before == "sdpa"
    with torch.no_grad():
        fused = model(**inputs, logits_to_keep=8).logits
        try:
            model.set_attn_implementation("eager")
            assert model.speech_encoder.config._attn_implementation == "eager"
            written_out = model(**inputs, logits_to_keep=8).logits
        finally:
            model.set_attn_implementation(before)
    assert (fused - written_out).abs().max() <= 1e-4


def test_blanks_are_zero_vectors_in_prompts_with_a_video_only(model: Any, processor: Any) -> None:
    scheme = processor.media
    ids = torch.tensor([[5, *[scheme.video_token_id] * scheme.frame_tokens, scheme.blank_token_id, 6]])
    pixels = torch.zeros(1, 3, scheme.image_size, scheme.image_size)
    with torch.no_grad():
        merged = model.embed(ids, pixels)[0]
        alone = model.embed(torch.tensor([[scheme.blank_token_id]]))[0]
    assert not merged[-2].any()
    assert merged[-1].any()
    assert torch.equal(alone[0], model.model.embed_tokens.weight[scheme.blank_token_id])


def test_pooling_takes_the_maximum_and_newlines_end_rows(model: Any) -> None:
    hidden = model.config.hidden_size
    patches = torch.arange(81.0)[None, :, None].expand(1, 81, hidden)  # 9 x 9: the last row and column are not seen
    pooled = model.model.pool(patches)
    assert pooled.shape == (1, 4, 4, hidden)
    assert pooled[0, :, :, 0].tolist() == [[18 * r + 2 * c + 10 for c in range(4)] for r in range(4)]
    with torch.no_grad():
        tokens = model.get_video_features(torch.rand(2, 3, 56, 56)).pooler_output
    assert tokens.shape == (2, 20, hidden)
    assert (tokens[:, 4::5] == model.model.image_newline).all()


def test_marks_of_pieces_are_sinusoids_from_the_second_on() -> None:
    marks = piece_marks(torch.tensor([0, 1, 2, 7]), 8).numpy()
    rates = 10_000 ** (-np.arange(4) * 2 / 8)
    assert not marks[0].any()
    assert marks[1].tolist() == [0, 1] * 4
    for row, number in ((2, 1), (3, 6)):
        assert marks[row, 0::2] == pytest.approx(np.sin(number * rates), abs=1e-6)
        assert marks[row, 1::2] == pytest.approx(np.cos(number * rates), abs=1e-6)


def test_a_window_is_read_by_itself(model: Any) -> None:
    scheme = model.config.scheme
    mel = torch.rand(1, scheme.mel_bins, 3000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whisper = model.speech_encoder(mel).last_hidden_state
        every, heard = model.windows(whisper), model.ln_speech(whisper)
        one = model.speech_Qformer(model.speech_query_tokens, heard[:, 7 * scheme.stride :][:, : scheme.window])
    assert every.shape == (scheme.windows, 1, model.config.qformer.hidden_size)
    assert torch.allclose(every[7], one[0], atol=1e-5)


def test_qformer_is_berts_formula() -> None:
    torch.manual_seed(0)
    shape = QFormerShape(hidden_size=8, num_attention_heads=2, intermediate_size=12, num_hidden_layers=1)
    qformer = QFormer(shape, channels=6).double().eval()
    layer: Any = qformer.bert["encoder"].get_submodule("layer.0")
    queries, sound = torch.randn(1, 3, 8).double(), torch.randn(2, 5, 6).double()

    def attend(block: Any, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        heads = [
            torch.softmax(q @ k.mT / 2, -1) @ v
            for q, k, v in zip(
                block.self.query(x).split(4, -1),
                block.self.key(source).split(4, -1),
                block.self.value(source).split(4, -1),
                strict=True,
            )
        ]
        return block.output.LayerNorm(block.output.dense(torch.cat(heads, -1)) + x)

    with torch.no_grad():
        x = qformer.bert["embeddings"].LayerNorm(queries).expand(2, 3, 8)
        x = attend(layer.attention, x, x)
        x = attend(layer.crossattention, x, sound)
        inner = layer.intermediate_query.dense(x)
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
        wanted = layer.output_query.LayerNorm(layer.output_query.dense(inner) + x)
        assert (qformer(queries, sound) - wanted).abs().max() <= 1e-12


def test_other_dimensions_run(processor: Any) -> None:
    """What the release does not use: several queries, overlapping windows, other pools, fewer mel bins."""
    config = VideoSalmonn2Config.from_pretrained(
        FAMILY.tiny,
        num_speech_query_token=2,
        second_per_window=0.333333,
        second_stride=0.25,
        use_final_linear=False,
        mm_projector_type="mlp3x_gelu",
        mm_spatial_pool_stride=3,
        video_fps=2,
        speech_config=VideoSalmonn2Config.from_pretrained(FAMILY.tiny).speech_config.to_dict() | {"num_mel_bins": 80},
    )
    other = VideoSalmonn2ForConditionalGeneration(config).eval()
    scheme = config.scheme
    assert (scheme.window, scheme.stride, scheme.piece_tokens, scheme.frame_tokens) == (17, 12, 124 * 2, 12)
    inputs = inputs_of(FAMILY, VideoSalmonn2Processor(processor.tokenizer, scheme=asdict(scheme)), *ROWS[FAMILY.name])
    assert inputs["input_features"].shape == (4, 80, 3000)
    with torch.no_grad():
        assert other(**inputs, logits_to_keep=1).logits.isfinite().all()
    assert not any(name.startswith("final_linear") for name in other.state_dict())
