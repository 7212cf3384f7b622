"""video-SALMONN 2+'s computation, apart from what the original's arrays show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from fastav.cache_argument import as_argument, of_output
from fastav.errors import MediaError
from fastav.models._qformer import QFormer
from fastav.models.video_salmonn2_plus import (
    QFormerShape,
    VideoSalmonn2PlusForConditionalGeneration,
    VideoSalmonn2PlusModel,
    VideoSalmonn2PlusProcessor,
)
from fastav.models.video_salmonn2_plus.speech import windows

TINY = Path(__file__).parents[1] / "reference" / "video_salmonn2_plus"
RANDOM = np.random.default_rng(0)
VIDEOS = [RANDOM.integers(0, 256, shape, dtype=np.uint8) for shape in ((8, 56, 84, 3), (5, 56, 56, 3))]
SOUNDS = [RANDOM.uniform(-0.5, 0.5, n).astype(np.float32) for n in (50_000, 481_000)]
ROWS = (  # question, video, sound: audio-visual, silent video, text alone, audio-visual with two pieces of sound
    ("What moves?", 0, 0),
    ("What colour is the square, if there is one?", 1, None),
    ("Hello!", None, None),
    ("And what is heard at the end?", 1, 1),
)


def load(dtype: torch.dtype) -> VideoSalmonn2PlusForConditionalGeneration:
    return VideoSalmonn2PlusForConditionalGeneration.from_pretrained(TINY, dtype=dtype)


@pytest.fixture(scope="module")
def model() -> VideoSalmonn2PlusForConditionalGeneration:
    return load(torch.float32)


@pytest.fixture(scope="module", params=["script", "dataset"])
def processor(request: pytest.FixtureRequest) -> VideoSalmonn2PlusProcessor:
    return VideoSalmonn2PlusProcessor.from_pretrained(TINY, positions=request.param)


def inputs_of(processor: VideoSalmonn2PlusProcessor, rows: Any) -> dict[str, Any]:
    return dict(
        processor(
            [processor.prompt(q, video=v is not None) for q, v, _ in rows],
            videos=[None if v is None else VIDEOS[v] for _, v, _ in rows],
            audio=[None if a is None else SOUNDS[a] for _, _, a in rows],
            seconds=3.0,
        )
    )


def generated(model: VideoSalmonn2PlusForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    ids = model.generate(**inputs, **({"do_sample": False, "max_new_tokens": 5} | options))
    return ids[:, inputs["input_ids"].shape[1] :]


def test_rows_of_a_padded_batch_equal_single_rows(processor: VideoSalmonn2PlusProcessor) -> None:
    model = load(torch.float64)
    batch = inputs_of(processor, ROWS)
    with torch.no_grad():
        together = model(**batch).logits
        for row, mask, logits in zip(ROWS, batch["attention_mask"], together, strict=True):
            alone = model(**inputs_of(processor, [row])).logits[0]
            assert (logits[mask.bool()] - alone).abs().max() <= 1e-4


def test_batch_generates_what_single_rows_do(model: Any, processor: VideoSalmonn2PlusProcessor) -> None:
    together = generated(model, inputs_of(processor, ROWS))
    alone = [generated(model, inputs_of(processor, [row]))[0] for row in ROWS]
    assert together.tolist() == torch.stack(alone).tolist()


def test_media_are_repeated_with_their_prompts(model: Any, processor: VideoSalmonn2PlusProcessor) -> None:
    single = [generated(model, inputs_of(processor, [row]), num_beams=2)[0].tolist() for row in ROWS]
    assert generated(model, inputs_of(processor, ROWS), num_beams=2).tolist() == single
    torch.manual_seed(0)
    several = generated(model, inputs_of(processor, ROWS), num_return_sequences=2, do_sample=True, top_k=1)
    greedy = generated(model, inputs_of(processor, ROWS))
    assert several.tolist() == greedy.repeat_interleave(2, 0).tolist()


def test_generating_without_a_cache_gives_the_same(model: Any, processor: VideoSalmonn2PlusProcessor) -> None:
    inputs = inputs_of(processor, ROWS[:1])
    assert generated(model, inputs, use_cache=False).tolist() == generated(model, inputs).tolist()


def test_media_are_encoded_once(model: Any, processor: VideoSalmonn2PlusProcessor) -> None:
    calls: list[int] = []
    hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in (model.visual, model.audio)]
    try:
        generated(model, inputs_of(processor, ROWS[:1]), min_new_tokens=5)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == 2


def test_embeddings_need_positions(model: Any, processor: VideoSalmonn2PlusProcessor) -> None:
    inputs = inputs_of(processor, ROWS[1:2])
    with torch.no_grad():
        embeds = model.embed(inputs["input_ids"], inputs["pixel_values_videos"], inputs["video_grid_thw"])
    ids = model.generate(inputs_embeds=embeds, position_ids=inputs["position_ids"], max_new_tokens=5, do_sample=False)
    assert ids.tolist() == generated(model, inputs).tolist()
    with pytest.raises(MediaError, match="do not tell where the clip is"):
        model(inputs_embeds=embeds)
    with pytest.raises(MediaError, match="do not tell where the clip is"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)
    with pytest.raises(MediaError, match="takes input_ids or inputs_embeds"):
        model()


def test_without_positions_the_model_falls_back_to_the_scripts(model: Any) -> None:
    script = VideoSalmonn2PlusProcessor.from_pretrained(TINY, positions="script")
    inputs = inputs_of(script, ROWS)
    with torch.no_grad():
        wanted = model(**inputs).logits
        alone = model(**{name: value for name, value in inputs.items() if name != "position_ids"}).logits
    assert torch.equal(alone, wanted)


def test_positions_by_the_dataset_must_be_given() -> None:
    model = VideoSalmonn2PlusForConditionalGeneration.from_pretrained(TINY, positions="dataset")
    processor = VideoSalmonn2PlusProcessor.from_pretrained(TINY, positions="dataset")
    inputs = inputs_of(processor, ROWS[:1])
    del inputs["position_ids"]
    with pytest.raises(MediaError, match="needs to know when frames are shown"):
        model(**inputs)


def test_decoding_by_hand_goes_on_where_the_prompt_ended(model: Any, processor: VideoSalmonn2PlusProcessor) -> None:
    inputs = inputs_of(processor, ROWS[:1])
    new = torch.tensor([[7, 8]])
    later = inputs["position_ids"][..., -1:] + 1 + torch.arange(2)
    with torch.no_grad():
        cache = of_output(model(**inputs))
        wanted = model(input_ids=new, **as_argument(cache), position_ids=later).logits
        for mask in (None, torch.ones(1, inputs["input_ids"].shape[1] + 2, dtype=torch.long)):
            cache = of_output(model(**inputs))
            ours = model(input_ids=new, **as_argument(cache), attention_mask=mask).logits
            assert (ours - wanted).abs().max() <= 1e-5


def test_a_cache_of_unknown_origin_is_an_error(model: Any) -> None:
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model.model(input_ids=torch.tensor([[1, 2, 3]]), **as_argument(cache))
        with pytest.raises(MediaError, match="does not tell where its prompts ended"):
            model(input_ids=torch.tensor([[4]]), **as_argument(cache))


def test_media_and_prompts_that_do_not_fit_are_an_error(model: Any) -> None:
    processor = VideoSalmonn2PlusProcessor.from_pretrained(TINY)
    inputs = inputs_of(processor, ROWS[:1])
    ids = inputs["input_ids"].clone()
    ids[ids == processor.media.audio_token_id] = 5
    with pytest.raises(MediaError, match="0 placeholders of id 263, their media give 60"):
        model(**inputs | {"input_ids": ids})
    with pytest.raises(MediaError, match="come without their sizes"):
        model(**inputs | {"video_grid_thw": None})
    with pytest.raises(MediaError, match="1 of the prompts show a video, video_grid_thw has 0"):
        model(inputs["input_ids"])


def test_loss_is_that_of_the_next_token(model: Any, processor: VideoSalmonn2PlusProcessor) -> None:
    inputs = inputs_of(processor, ROWS[1:2])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        last = model(**inputs, logits_to_keep=2).logits
    wanted = torch.nn.functional.cross_entropy(output.logits[0, -4:-1], labels[0, -3:])
    assert torch.allclose(output.loss, wanted, atol=1e-5)
    assert torch.allclose(last, output.logits[:, -2:], atol=1e-5)


def test_base_model_is_the_whole_without_its_head(model: Any, processor: VideoSalmonn2PlusProcessor) -> None:
    base = VideoSalmonn2PlusModel.from_pretrained(TINY, dtype=torch.float32)
    inputs = inputs_of(processor, ROWS[:1])
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
        assert torch.allclose(model.lm_head(hidden), model(**inputs).logits, atol=1e-5)


def test_windows_follow_one_another() -> None:
    speech = torch.arange(2 * 7 * 3).reshape(2, 7, 3).float()
    ours = windows(speech, 3)
    assert ours.shape == (4, 3, 3)
    assert torch.equal(ours[1], speech[0, 3:6])
    assert torch.equal(ours[2], speech[1, :3])


def test_a_window_is_read_where_cross_attention_is() -> None:
    shape = QFormerShape(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, encoder_width=6
    )
    qformer = QFormer(shape, 6)
    keys = {name.split(".")[3] for name in qformer.state_dict() if "crossattention" in name}
    assert keys == {"0", "1", "2", "3"}
    every_other = QFormerShape(**{f: getattr(shape, f) for f in shape.__slots__} | {"cross_attention_freq": 2})
    keys = {
        name.split(".")[3] for name in QFormer(every_other, 6, cross_every=2).state_dict() if "crossattention" in name
    }
    assert keys == {"0", "2"}
    queries = torch.randn(1, 1, 8)
    with torch.no_grad():
        one, other = (qformer(queries, torch.randn(1, 5, 6)) for _ in range(2))
    assert not torch.allclose(one, other)
