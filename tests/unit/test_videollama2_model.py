"""VideoLLaMA2's computation, apart from what the original's arrays show."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
from transformers import AutoTokenizer
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from fastav.errors import MediaError
from fastav.models._merging import merged
from fastav.models._native_modeling import positions
from fastav.models.videollama2 import (
    VideoLlama2ForConditionalGeneration,
    VideoLlama2Processor,
    fbank,
)
from fastav.models.videollama2.audio import mel_filters, resample
from fastav.models.videollama2.beats import PositionConv, relative_buckets

TINY = Path(__file__).parents[1] / "reference" / "videollama2"
RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 256, (2, 8, 40, 60, 3), dtype=np.uint8)
SOUNDS = RANDOM.uniform(-0.5, 0.5, (2, 50_000)).astype(np.float32)


def load(dtype: torch.dtype) -> tuple[VideoLlama2ForConditionalGeneration, VideoLlama2Processor]:
    """The tiny checkpoint, hearing 3 s instead of 30: a tenth of the audio tokens."""
    model = VideoLlama2ForConditionalGeneration.from_pretrained(TINY, dtype=dtype, audio_seconds=3)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return model, VideoLlama2Processor(tokenizer, scheme=asdict(model.config.scheme))


@pytest.fixture(scope="module")
def loaded() -> tuple[VideoLlama2ForConditionalGeneration, VideoLlama2Processor]:
    return load(torch.float32)


@pytest.fixture
def model(loaded: Any) -> VideoLlama2ForConditionalGeneration:
    return loaded[0]


@pytest.fixture
def processor(loaded: Any) -> VideoLlama2Processor:
    return loaded[1]


ROWS = (  # question, video, sound: audio-visual, silent video, sound alone, text alone, audio-visual
    ("What moves?", 0, 0),
    ("What colour is the square, if there is one?", 1, None),
    ("Describe it.", None, 1),
    ("Hello!", None, None),
    ("And what is heard at the end of all this?", 1, 0),
)


def inputs_of(processor: VideoLlama2Processor, rows: Any) -> dict[str, Any]:
    return dict(
        processor(
            [processor.prompt(q, video=v is not None, audio=a is not None) for q, v, a in rows],
            videos=[None if v is None else FRAMES[v] for _, v, _ in rows],
            audio=[None if a is None else SOUNDS[a] for _, _, a in rows],
        )
    )


def generated(model: VideoLlama2ForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    ids = model.generate(**inputs, max_new_tokens=5, **({"do_sample": False} | options))
    return ids[:, inputs["input_ids"].shape[1] :]


def test_rows_of_a_padded_batch_equal_single_rows(processor: VideoLlama2Processor) -> None:
    model, _ = load(torch.float64)  # in float32 rounding adds up to 2e-4
    batch = inputs_of(processor, ROWS)
    with torch.no_grad():
        together = model(**batch).logits
        for row, mask, logits in zip(ROWS, batch["attention_mask"], together, strict=True):
            alone = model(**inputs_of(processor, [row])).logits[0]
            assert (logits[mask.bool()] - alone).abs().max() <= 1e-4


def test_batch_generates_what_single_rows_do(
    model: VideoLlama2ForConditionalGeneration, processor: VideoLlama2Processor
) -> None:
    together = generated(model, inputs_of(processor, ROWS))
    alone = [generated(model, inputs_of(processor, [row]))[0] for row in ROWS]
    assert together.tolist() == torch.stack(alone).tolist()


def test_media_are_repeated_with_their_prompts(
    model: VideoLlama2ForConditionalGeneration, processor: VideoLlama2Processor
) -> None:
    rows = ROWS[:4]
    single = [generated(model, inputs_of(processor, [row]), num_beams=2)[0].tolist() for row in rows]
    assert generated(model, inputs_of(processor, rows), num_beams=2).tolist() == single
    torch.manual_seed(0)
    several = generated(model, inputs_of(processor, rows), num_return_sequences=2, do_sample=True, top_k=1)
    greedy = generated(model, inputs_of(processor, rows))
    assert several.tolist() == greedy.repeat_interleave(2, 0).tolist()


def test_generating_without_a_cache_gives_the_same(
    model: VideoLlama2ForConditionalGeneration, processor: VideoLlama2Processor
) -> None:
    inputs = inputs_of(processor, ROWS[1:2])
    assert generated(model, inputs, use_cache=False).tolist() == generated(model, inputs).tolist()


def test_generating_from_embeddings_gives_the_same(
    model: VideoLlama2ForConditionalGeneration, processor: VideoLlama2Processor
) -> None:
    inputs = inputs_of(processor, ROWS[1:2])
    with torch.no_grad():
        embeddings = model.model.embed(inputs["input_ids"], inputs["pixel_values_videos"])
    ids = model.generate(inputs_embeds=embeddings, max_new_tokens=5, do_sample=False)
    assert ids.tolist() == generated(model, inputs).tolist()


def test_repetition_penalty_does_not_see_the_prompt(model: VideoLlama2ForConditionalGeneration) -> None:
    config = model.generation_config.__class__(repetition_penalty=1.5)
    processors = model._get_logits_processor(config, input_ids_seq_length=7, device="cpu", model_kwargs={})
    penalties = [p for p in processors if isinstance(p, RepetitionPenaltyLogitsProcessor)]
    assert [p.prompt_ignore_length for p in penalties] == [7]


def test_positions_count_from_the_first_unmasked_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    wanted = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
    assert torch.equal(torch.as_tensor(positions(mask, 4)), wanted)
    assert torch.equal(torch.as_tensor(positions(mask, 1)), wanted[:, -1:])
    assert positions(mask[:, None, None], 4) is None


def test_too_few_placeholders_are_an_error(
    model: VideoLlama2ForConditionalGeneration, processor: VideoLlama2Processor
) -> None:
    inputs = inputs_of(processor, ROWS[:1])
    for token in (processor.media.video_token_id, processor.media.audio_token_id):
        ids = inputs["input_ids"].clone()
        ids[ids == token] = 5
        with pytest.raises(MediaError, match=f"0 placeholders of id {token}"):
            model(**inputs | {"input_ids": ids})


def test_placeholders_need_not_be_rows_of_the_embedding(
    model: VideoLlama2ForConditionalGeneration, processor: VideoLlama2Processor
) -> None:
    features, table = torch.ones(2, model.config.hidden_size), model.model.embed_tokens
    both = merged(table, torch.tensor([[3, 10**6, 10**6, 4]]), None, {10**6: features})
    assert torch.equal(both[0, 1:3], features)
    assert torch.equal(both[0, ::3], table(torch.tensor([3, 4])))


def test_loss_is_that_of_the_next_token(
    model: VideoLlama2ForConditionalGeneration, processor: VideoLlama2Processor
) -> None:
    inputs = inputs_of(processor, ROWS[1:2])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    wanted = torch.nn.functional.cross_entropy(output.logits[0, -4:-1], labels[0, -3:])
    assert torch.allclose(output.loss, wanted, atol=1e-5)


def test_last_logits_are_those_of_all(
    model: VideoLlama2ForConditionalGeneration, processor: VideoLlama2Processor
) -> None:
    inputs = inputs_of(processor, ROWS[1:2])
    with torch.no_grad():
        every, last = model(**inputs).logits, model(**inputs, logits_to_keep=2).logits
    assert last.shape[1] == 2
    assert torch.allclose(last, every[:, -2:], atol=1e-5)


def test_decoder_is_where_the_hooks_look(model: VideoLlama2ForConditionalGeneration) -> None:
    assert model.get_decoder() is model.model
    assert len(model.get_decoder().layers) == model.config.num_hidden_layers


def test_fused_audio_attention_equals_the_written_out_one() -> None:
    model, _ = load(torch.float64)
    features = torch.randn(2, 160, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused = model.model.audio_tower(features)
        model.set_attn_implementation("eager")
        written_out = model.model.audio_tower(features)
    assert (fused - written_out).abs().max() <= 1e-9


def test_relative_buckets_are_t5s() -> None:
    def bucket(offset: int) -> int:
        base, distance = 160 * (offset > 0), abs(offset)
        far = 80 + math.floor(math.log(max(distance, 1) / 80) / math.log(800 / 80) * 80 + 1e-9)
        return base + (distance if distance < 80 else min(far, 159))

    buckets = relative_buckets(1496, 320, 800, torch.device("cpu")).tolist()
    wanted = [bucket(offset) for offset in range(-1495, 1496)]
    assert sum(ours != theirs for ours, theirs in zip(buckets, wanted, strict=True)) <= 4  # float32 on a boundary
    assert max(buckets) == 319


def test_position_bias_reads_the_bucket_of_each_key_minus_query(model: VideoLlama2ForConditionalGeneration) -> None:
    attention: Any = model.model.audio_tower.encoder.layers[0].self_attn
    table = attention.relative_attention_bias.weight
    bias = attention.position_bias(7, torch.device("cpu"))
    assert bias.shape == (1, table.shape[1], 7, 7)
    assert torch.equal(bias[0, :, 2, 5], table[160 + 3])
    assert torch.equal(bias[0, :, 6, 1], table[5])


def test_position_convolution_has_one_norm_per_tap() -> None:
    conv = PositionConv(channels=8, kernel=4, groups=2)
    with torch.no_grad():
        conv.weight_v.normal_()
        conv.weight_g.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])[None, None])
    assert torch.allclose(conv.weight.square().sum((0, 1)).sqrt(), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert conv(torch.randn(1, 5, 8)).shape == (1, 5, 8)
    half = conv.to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rate", "samples"), [(44_100, 44_100), (48_000, 4801), (8000, 8000), (8000, 8001), (16_000, 9)]
)
def test_resampling_is_scipys(rate: int, samples: int) -> None:
    sound = RANDOM.normal(size=samples)
    wanted = sound if rate == 16_000 else scipy.signal.resample(sound, math.ceil(samples * 16_000 / rate))
    assert np.abs(resample(sound, rate) - wanted).max() <= 1e-12


def test_filter_bank_is_kaldis_formula() -> None:
    sound = RANDOM.normal(size=400 + 160 * 2) * 1000
    ours = fbank(torch.from_numpy(sound), bins=24)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    filters = mel_filters(24).double().numpy()
    for row in range(3):
        frame = sound[160 * row : 160 * row + 400]
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        spectrum = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512) @ (frame * hann**0.85)
        assert np.abs(np.log(filters @ np.abs(spectrum) ** 2) - ours[row].numpy()).max() <= 1e-6


def test_mel_filters_are_evenly_spaced_triangles() -> None:
    filters = mel_filters(128)
    assert filters.shape == (128, 257)
    assert not filters[:, -1].any()
    mel = 1127 * np.log1p(np.arange(257) * 31.25 / 700)
    edges = np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(8000 / 700), 130)
    wanted = np.interp(mel[:256], edges[40:43], [0, 1, 0])
    assert np.abs(filters[40, :256].numpy() - wanted).max() <= 1e-4
