"""The computation of our own families, apart from what the originals' arrays show."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from fastav.errors import MediaError
from fastav.models._merging import merged
from fastav.models._native_modeling import positions
from support.native import (
    BOTH,
    ROWS,
    SILENT,
    VIDEO_SALMONN2,
    VIDEO_SALMONN2_PLUS,
    VIDEOLLAMA2,
    Family,
    each_family,
    generated,
    inputs_of,
)

VL2, S2, PLUS = VIDEOLLAMA2, VIDEO_SALMONN2, VIDEO_SALMONN2_PLUS
Case = tuple[Family, Any, Callable[..., dict[str, Any]]]


def load(family: Family, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny checkpoint; VideoLLaMA2 takes 3 s of sound instead of 30: a tenth of the audio tokens."""
    return family.model_class.from_pretrained(
        family.tiny, dtype=dtype, **({"audio_seconds": 3} if family is VL2 else {})
    )


def processors(family: Family, model: Any) -> list[Any]:
    if family is PLUS:
        return [family.processor(positions=rule) for rule in ("script", "dataset")]
    return [family.processor_class(AutoTokenizer.from_pretrained(family.tiny), scheme=asdict(model.config.scheme))]


@pytest.fixture(scope="module", params=["videollama2", "video_salmonn2", "plus-script", "plus-dataset"])
def case(request: pytest.FixtureRequest) -> Case:
    """A family, its model, and what makes inputs of rows; video-SALMONN 2+ by both rules for positions."""
    family = next(f for f in (VL2, S2, PLUS) if f.name == request.param or (f is PLUS and "-" in request.param))
    model = load(family)
    return family, model, partial(inputs_of, family, processors(family, model)[request.param == "plus-dataset"])


@each_family
@torch.no_grad()
def test_rows_of_a_padded_batch_equal_single_rows(family: Family) -> None:
    # in float32 the rounding of the other two adds up to 2e-4
    model = load(family, torch.float32 if family is S2 else torch.float64)
    for processor in processors(family, model):
        rows = ROWS[family.name]
        batch = inputs_of(family, processor, *rows)
        assert (batch["attention_mask"].sum(1) < batch["input_ids"].shape[1]).sum() == len(rows) - 1
        for row, mask, logits in zip(rows, batch["attention_mask"], model(**batch).logits, strict=True):
            alone = model(**inputs_of(family, processor, row)).logits[0]
            assert (logits[mask.bool()] - alone).abs().max() <= 1e-4


def test_batch_generates_what_single_rows_do(case: Case) -> None:
    family, model, made = case
    alone = [generated(model, made(row))[0] for row in ROWS[family.name]]
    assert generated(model, made(*ROWS[family.name])).tolist() == torch.stack(alone).tolist()


def test_media_are_repeated_with_their_prompts(case: Case) -> None:
    family, model, made = case
    rows = ROWS[family.name][:4]
    single = [generated(model, made(row), num_beams=2)[0].tolist() for row in rows]
    assert generated(model, made(*rows), num_beams=2).tolist() == single
    torch.manual_seed(0)
    several = generated(model, made(*rows), num_return_sequences=2, do_sample=True, top_k=1)
    assert several.tolist() == generated(model, made(*rows)).repeat_interleave(2, 0).tolist()


def test_generating_without_a_cache_or_from_embeddings_gives_the_same(case: Case) -> None:
    family, model, made = case
    for row in (SILENT, BOTH):
        inputs = made(row)
        wanted = generated(model, inputs).tolist()
        assert generated(model, inputs, use_cache=False).tolist() == wanted
        media = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        media.pop("feature_attention_mask", None)
        placed = {name: media.pop(name) for name in ("position_ids",) if name in media}
        with torch.no_grad():
            embeds = (model.model if family is VL2 else model).embed(inputs["input_ids"], **media)
        ids = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False, **placed)
        assert ids.tolist() == wanted


@pytest.mark.parametrize("family", [VL2, S2], ids=lambda family: family.name)
def test_repetition_penalty_does_not_see_the_prompt(family: Family) -> None:
    model = family.model()
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


def test_too_few_placeholders_are_an_error(case: Case) -> None:
    _, model, made = case
    inputs, scheme = made(BOTH), model.config.scheme
    for token in (scheme.audio_token_id, scheme.video_token_id):
        ids = inputs["input_ids"].clone()
        ids[ids == token] = 5
        with pytest.raises(MediaError, match=f"0 placeholders of id {token}, their media give"):
            model(**inputs | {"input_ids": ids})


def test_placeholders_need_not_be_rows_of_the_embedding(case: Case) -> None:
    table = case[1].get_input_embeddings()
    features = torch.ones(2, table.weight.shape[1])
    both = merged(table, torch.tensor([[3, 10**6, 10**6, 4]]), None, {10**6: features})
    assert torch.equal(both[0, 1:3], features)
    assert torch.equal(both[0, ::3], table(torch.tensor([3, 4])))


@torch.no_grad()
def test_loss_is_that_of_the_next_token_and_last_logits_are_those_of_all(case: Case) -> None:
    _, model, made = case
    inputs = made(SILENT)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    output, last = model(**inputs, labels=labels), model(**inputs, logits_to_keep=2).logits
    wanted = torch.nn.functional.cross_entropy(output.logits[0, -4:-1], labels[0, -3:])
    assert torch.allclose(output.loss, wanted, atol=1e-5)
    assert last.shape[1] == 2
    assert torch.allclose(last, output.logits[:, -2:], atol=1e-5)


@torch.no_grad()
def test_the_model_without_its_head_gives_its_last_hidden_states(case: Case) -> None:
    family, model, made = case
    base = model.model if family is not PLUS else family.base_class.from_pretrained(family.tiny, dtype=torch.float32)
    assert isinstance(base, family.base_class)
    for row in (SILENT,) if family is S2 else (SILENT, BOTH):  # whose audio encoder is outside of its base
        inputs = made(row)
        assert torch.allclose(model.lm_head(base(**inputs).last_hidden_state), model(**inputs).logits, atol=1e-5)


def test_decoder_is_where_the_hooks_look(case: Case) -> None:
    _, model, _ = case
    assert model.get_decoder() is model.model
    assert len(model.get_decoder().layers) == model.config.get_text_config(decoder=True).num_hidden_layers


@each_family
def test_arguments_have_the_names_and_the_order_of_qwen2_5_vl(family: Family) -> None:
    """Whoever passes arguments by place finds each where transformers' own models have it; media have names."""
    models = (family.model_class, Qwen2_5_VLForConditionalGeneration), (family.base_class, Qwen2_5_VLModel)
    for ours, theirs in models:
        known, names = list(signature(theirs.forward).parameters), list(signature(ours.forward).parameters)
        media = names.index("pixel_values_videos")
        assert names[:media] == known[: known.index("pixel_values")]
        shared = [name for name in names if name in known]
        assert shared == sorted(shared, key=known.index)
