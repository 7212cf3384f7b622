"""video-SALMONN 2's computation, apart from what the original's arrays show."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from fastav.errors import MediaError
from fastav.models._qformer import QFormer
from fastav.models.video_salmonn2 import (
    QFormerShape,
    VideoSalmonn2Adapter,
    VideoSalmonn2Config,
    VideoSalmonn2ForConditionalGeneration,
    VideoSalmonn2Model,
    VideoSalmonn2Processor,
)
from fastav.models.video_salmonn2.modeling import piece_marks

TINY = Path(__file__).parents[1] / "reference" / "video_salmonn2"
RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (5, 40, 60, 3), dtype=np.uint8)
SOUND = RANDOM.uniform(-0.5, 0.5, 31 * 16_000).astype(np.float32)  # two pieces
MEDIA = ("pixel_values_videos", "input_features", "audio_index", "piece_index")


@pytest.fixture(scope="module")
def loaded() -> tuple[VideoSalmonn2ForConditionalGeneration, VideoSalmonn2Processor]:
    return VideoSalmonn2Adapter().load(str(TINY), dtype=torch.float32)


@pytest.fixture
def model(loaded: Any) -> VideoSalmonn2ForConditionalGeneration:
    return loaded[0]


@pytest.fixture
def processor(loaded: Any) -> VideoSalmonn2Processor:
    return loaded[1]


ROWS = (  # question, frames, samples, seconds: audio-visual, silent, sound alone, text alone, audio-visual and long
    ("What moves?", 3, 48_000, 3.0),
    ("What colour is the square, if there is one?", 2, None, 2.0),
    ("Describe it.", None, 50_000, None),
    ("Hello!", None, None, None),
    ("And what is heard at the end of all this?", 5, 31 * 16_000, 31.0),
)


def inputs_of(processor: VideoSalmonn2Processor, rows: Any) -> dict[str, Any]:
    return dict(
        processor(
            [processor.prompt(q, video=f is not None, audio=s is not None) for q, f, s, _ in rows],
            videos=[None if f is None else FRAMES[-f:] for _, f, _, _ in rows],
            audio=[None if s is None else SOUND[:s] for _, _, s, _ in rows],
            video_seconds=[seconds for *_, seconds in rows],
        )
    )


def generated(model: VideoSalmonn2ForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    ids = model.generate(**inputs, max_new_tokens=4, **({"do_sample": False} | options))
    return ids[:, inputs["input_ids"].shape[1] :]


def test_rows_of_a_padded_batch_equal_single_rows(
    model: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor
) -> None:
    batch = inputs_of(processor, ROWS)
    assert (batch["attention_mask"].sum(1) < batch["input_ids"].shape[1]).sum() == 4
    with torch.no_grad():
        together = model(**batch).logits
        for row, mask, logits in zip(ROWS, batch["attention_mask"], together, strict=True):
            alone = model(**inputs_of(processor, [row])).logits[0]
            assert (logits[mask.bool()] - alone).abs().max() <= 1e-4


def test_batch_generates_what_single_rows_do(
    model: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor
) -> None:
    together = generated(model, inputs_of(processor, ROWS))
    alone = [generated(model, inputs_of(processor, [row]))[0] for row in ROWS]
    assert together.tolist() == torch.stack(alone).tolist()


def test_media_are_repeated_with_their_prompts(
    model: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor
) -> None:
    rows = ROWS[:4]
    single = [generated(model, inputs_of(processor, [row]), num_beams=2)[0].tolist() for row in rows]
    assert generated(model, inputs_of(processor, rows), num_beams=2).tolist() == single
    torch.manual_seed(0)
    several = generated(model, inputs_of(processor, rows), num_return_sequences=2, do_sample=True, top_k=1)
    greedy = generated(model, inputs_of(processor, rows))
    assert several.tolist() == greedy.repeat_interleave(2, 0).tolist()


def test_sound_whose_order_is_not_given_is_repeated_too(
    model: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor
) -> None:
    inputs = inputs_of(processor, ROWS[2:3])
    plain = {name: value for name, value in inputs.items() if name not in ("audio_index", "piece_index")}
    assert generated(model, plain, num_beams=2).tolist() == generated(model, inputs, num_beams=2).tolist()


def test_generating_without_a_cache_gives_the_same(
    model: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor
) -> None:
    inputs = inputs_of(processor, ROWS[1:2])
    assert generated(model, inputs, use_cache=False).tolist() == generated(model, inputs).tolist()


def test_generating_from_embeddings_gives_the_same(
    model: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor
) -> None:
    inputs = inputs_of(processor, ROWS[:1])
    with torch.no_grad():
        embeddings = model.embed(inputs["input_ids"], *(inputs[name] for name in MEDIA))
    ids = model.generate(inputs_embeds=embeddings, max_new_tokens=4, do_sample=False)
    assert ids.tolist() == generated(model, inputs).tolist()


def test_repetition_penalty_does_not_see_the_prompt(model: VideoSalmonn2ForConditionalGeneration) -> None:
    config = model.generation_config.__class__(repetition_penalty=1.5)
    processors = model._get_logits_processor(config, input_ids_seq_length=7, device="cpu", model_kwargs={})
    penalties = [p for p in processors if isinstance(p, RepetitionPenaltyLogitsProcessor)]
    assert [p.prompt_ignore_length for p in penalties] == [7]


def test_eager_attention_gives_the_same(
    model: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor
) -> None:
    inputs = inputs_of(processor, ROWS)
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


def test_too_few_placeholders_are_an_error(
    model: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor
) -> None:
    inputs = inputs_of(processor, ROWS[:1])
    for token in (processor.media.video_token_id, processor.media.audio_token_id):
        ids = inputs["input_ids"].clone()
        ids[ids == token] = 5
        with pytest.raises(MediaError, match=f"0 placeholders of id {token}"):
            model(**inputs | {"input_ids": ids})


def test_blanks_are_zero_vectors_in_prompts_with_a_video_only(
    model: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor
) -> None:
    scheme = processor.media
    ids = torch.tensor([[5, *[scheme.video_token_id] * scheme.frame_tokens, scheme.blank_token_id, 6]])
    pixels = torch.zeros(1, 3, scheme.image_size, scheme.image_size)
    with torch.no_grad():
        merged = model.embed(ids, pixels)[0]
        alone = model.embed(torch.tensor([[scheme.blank_token_id]]))[0]
    assert not merged[-2].any()
    assert merged[-1].any()
    assert torch.equal(alone[0], model.model.embed_tokens.weight[scheme.blank_token_id])


def test_loss_is_that_of_the_next_token(
    model: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor
) -> None:
    inputs = inputs_of(processor, ROWS[1:2])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    wanted = torch.nn.functional.cross_entropy(output.logits[0, -4:-1], labels[0, -3:])
    assert torch.allclose(output.loss, wanted, atol=1e-5)


def test_decoder_is_where_the_hooks_look(model: VideoSalmonn2ForConditionalGeneration) -> None:
    assert model.get_decoder() is model.model
    assert len(model.get_decoder().layers) == model.config.num_hidden_layers


def test_decoder_without_its_head_sees(
    model: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor
) -> None:
    inputs = inputs_of(processor, ROWS[1:2])
    assert isinstance(model.model, VideoSalmonn2Model)
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        assert torch.allclose(model.lm_head(hidden), model(**inputs).logits, atol=1e-5)


def test_pooling_takes_the_maximum_and_newlines_end_rows(model: VideoSalmonn2ForConditionalGeneration) -> None:
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


def test_a_window_is_read_by_itself(model: VideoSalmonn2ForConditionalGeneration) -> None:
    scheme = model.config.scheme
    mel = torch.rand(1, scheme.mel_bins, 3000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        every = model.windows(model.whisper_features(mel))
        heard = model.ln_speech(model.speech_encoder(mel).last_hidden_state)
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


def test_other_dimensions_run(processor: VideoSalmonn2Processor) -> None:
    """What the release does not use: several queries, overlapping windows, other pools, fewer mel bins."""
    config = VideoSalmonn2Config.from_pretrained(
        TINY,
        num_speech_query_token=2,
        second_per_window=0.333333,
        second_stride=0.25,
        use_final_linear=False,
        mm_projector_type="mlp3x_gelu",
        mm_spatial_pool_stride=3,
        video_fps=2,
        speech_config=VideoSalmonn2Config.from_pretrained(TINY).speech_config.to_dict() | {"num_mel_bins": 80},
    )
    other = VideoSalmonn2ForConditionalGeneration(config).eval()
    scheme = config.scheme
    assert (scheme.window, scheme.stride, scheme.piece_tokens, scheme.frame_tokens) == (17, 12, 124 * 2, 12)
    inputs = inputs_of(VideoSalmonn2Processor(processor.tokenizer, scheme=asdict(scheme)), ROWS)
    assert inputs["input_features"].shape == (4, 80, 3000)
    with torch.no_grad():
        assert other(**inputs, logits_to_keep=1).logits.isfinite().all()
    assert not any(name.startswith("final_linear") for name in other.state_dict())
