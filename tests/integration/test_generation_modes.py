"""Ways of generating that stay exact, and ways that are refused in words."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from fastav.engines.transformers import prune
from fastav.errors import PlanError, UnsupportedModel, UnsupportedPlan
from fastav.plan import Keep, Plan, Share, Step, Tokens
from support import flash
from support.cases import PLAN, ROWS, STEPS, generate, rules_of
from support.oracle import drop_lowest, keep_only_first, oracle_logits
from support.tiny import AUDIO_ID, VIDEO_ID, TinyAdapter, pad_left, prompt, tiny_model

IDS = ROWS[0]
N = IDS.shape[1]
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def logprobs(model, sequence):
    with torch.no_grad():
        return oracle_logits(model, sequence[None], N, rules_of(IDS)).log_softmax(-1)


def test_beams_score_as_the_oracle_scores_them(model):
    out, _ = generate(
        model, INPUTS, num_beams=3, num_return_sequences=3, output_logits=False, output_scores=True, length_penalty=0.0
    )
    assert len({tuple(s.tolist()) for s in out.sequences}) == 3
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        rows = logprobs(model, sequence)[N - 1 : -1]
        assert abs(rows.gather(1, sequence[N:, None]).sum() - score) < 1e-3


def test_sampled_sequences_have_the_oracles_logits(model):
    torch.manual_seed(0)
    out, _ = generate(model, INPUTS, do_sample=True, num_return_sequences=4)
    assert len({tuple(s.tolist()) for s in out.sequences}) > 1
    for row, sequence in enumerate(out.sequences):
        with torch.no_grad():
            expected = oracle_logits(model, sequence[None], N, rules_of(IDS))[N - 1 : -1]
        assert (torch.stack([step[row] for step in out.logits]) - expected).abs().max() < 1e-4


def test_a_pruned_cache_can_be_continued(model):
    whole, _ = generate(model, INPUTS)
    cache = DynamicCache(config=model.config)
    with prune(model, PLAN, adapter=TinyAdapter()):
        first = model.generate(**INPUTS, past_key_values=cache, max_new_tokens=2, do_sample=False)
        rest = model.generate(
            input_ids=first,
            attention_mask=torch.ones_like(first),
            past_key_values=cache,
            max_new_tokens=STEPS - 2,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(rest.sequences, whole.sequences)
    assert (torch.cat(rest.logits) - torch.cat(whole.logits[2:])).abs().max() < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager", flash.NAME])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_a_second_turn_of_text_equals_the_oracle(attention, rows):
    model, turn = tiny_model(attention), prompt(video=0, audio=0, before=4, after=0, seed=9)
    inputs = pad_left(rows)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()):
        model(**inputs, position_ids=inputs["attention_mask"].cumsum(1) - 1, past_key_values=cache)
        more = turn.expand(len(rows), -1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
        positions = mask.cumsum(1)[:, -more.shape[1] :] - 1
        out = model(more, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    for b, ids in enumerate(rows):
        with torch.no_grad():
            expected = oracle_logits(model, torch.cat([ids, turn], 1), ids.shape[1], rules_of(ids))[-more.shape[1] :]
        assert (out[b] - expected).abs().max() < 1e-4


def test_the_cache_holds_what_the_plan_says(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()):
        model(**INPUTS, past_key_values=cache)
    layout = TinyAdapter().layouts(model.config, INPUTS)[0]
    assert [layer.keys.shape[2] for layer in cache.layers] == list(PLAN.tokens(layout, 6))
    assert cache.get_seq_length() == N


def test_logits_of_text_tokens_are_exact_and_length_is_kept(model):
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()):
        out = model(**INPUTS).logits
    with torch.no_grad():
        expected = oracle_logits(model, IDS, N, rules_of(IDS))
    text = IDS[0] < 62
    assert out.shape == (1, N, 64)
    assert (out[0, text] - expected[text]).abs().max() < 1e-4


def test_given_scores_decide(model):
    scores = torch.zeros_like(IDS, dtype=torch.float32)
    scores[0, 10] = 1.0
    plan = Plan((Step(layers="2", method="given", keep=Keep(media=Share(0.01))),))
    with torch.no_grad(), prune(model, plan, adapter=TinyAdapter(), scores=scores):
        out = model(**INPUTS).logits[0, -1]
    media = IDS[0] >= 62
    hidden = media.clone()
    hidden[10] = False
    with torch.no_grad():
        expected = oracle_logits(model, IDS, N, {2: lambda score, hide: hidden})[-1]
    assert (out - expected).abs().max() < 1e-4


REFUSED = {
    "assisted": ({"assistant_model": "itself"}, "draft tokens"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "draft tokens"),
    "chunked": ({"prefill_chunk_size": 8}, "chunk"),
    "uncached": ({"use_cache": False}, "prune anew"),
    "static": ({"cache_implementation": "static"}, "different lengths"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_generate_refuses_what_cannot_be_exact(model, case):
    options, reason = REFUSED[case]
    options = {key: model if value == "itself" else value for key, value in options.items()}
    with pytest.raises(UnsupportedPlan, match=reason):
        generate(model, INPUTS, **options)


def refuse(reason, call, *, model, error=UnsupportedPlan, plan=PLAN, **options):
    with pytest.raises(error, match=reason), torch.no_grad(), prune(model, plan, adapter=TinyAdapter(), **options):
        call()


def test_forward_refuses_what_cannot_be_exact(model):
    static = StaticCache(config=model.config, max_cache_len=64)
    refuse("StaticCache", lambda: model(**INPUTS, past_key_values=static), model=model)
    foreign = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :4], past_key_values=foreign)
    refuse("without this plan", lambda: model(IDS[:, 4:], past_key_values=foreign), model=model)
    refuse("called by itself", lambda: model.model(IDS), model=model)
    embeds = model.model.embed_tokens(IDS)
    refuse("tell audio from text", lambda: model(inputs_embeds=embeds), model=model)
    right = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).index_fill(1, torch.tensor([N - 1]), 0)}
    refuse("pad on the left", lambda: model(**right), model=model)
    refuse("without a prompt", lambda: model(), model=model)
    layouts = TinyAdapter().layouts(model.config, INPUTS)
    refuse("do not fit", lambda: model(IDS[:, :8]), model=model, layouts=layouts)


def test_a_decoder_on_several_devices_is_refused():
    model = tiny_model()
    model.model.layers[3].to("meta")
    refuse("spread over cpu, meta", lambda: None, model=model)


def test_media_in_a_later_turn_is_refused(model):
    def later():
        cache = DynamicCache(config=model.config)
        model(**INPUTS, past_key_values=cache)
        model(prompt(seed=4), past_key_values=cache)

    refuse("after the first prefill", later, model=model)


def test_another_plans_cache_is_refused(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()):
        model(**INPUTS, past_key_values=cache)
    other = Plan((Step(layers="5", method="position", keep=Keep(media=Share(0.5))),))
    refuse("without this plan", lambda: model(IDS[:, :1], past_key_values=cache), model=model, plan=other)


def test_gradients_are_refused(model):
    with pytest.raises(UnsupportedPlan, match="inference_mode"), prune(model, PLAN, adapter=TinyAdapter()):
        model(**INPUTS)


def test_entering_twice_is_refused(model):
    with prune(model, PLAN, adapter=TinyAdapter()):
        refuse("already", lambda: None, model=model)
        with torch.no_grad():
            model(**INPUTS)


def test_plans_that_cannot_be_carried_out_are_refused_on_entry(model):
    last = Plan((Step(layers="0", method="last-query", keep=Keep(media=Share(0.5))),))
    refuse("no layer has attended", lambda: None, model=model, plan=last)
    given = Plan((Step(layers="0", method="given", keep=Keep(media=Share(0.5))),))
    refuse("none are given", lambda: None, model=model, plan=given)
    bad = torch.full((1, N), torch.nan)
    refuse("not finite", lambda: None, model=model, plan=given, scores=bad, error=PlanError)
    deep = Plan((Step(layers="6", method="position", keep=Keep(media=Share(0.5))),))
    refuse("do not exist", lambda: None, model=model, plan=deep, error=PlanError)


def test_attention_without_a_tap_is_refused():
    refuse("flex_attention", lambda: None, model=tiny_model("flex_attention"))


def test_layers_that_mix_neighbours_are_refused():
    model = tiny_model()
    model.config.layer_types = ["full_attention"] * 3 + ["linear_attention"] * 3
    refuse("mix neighbouring tokens", lambda: None, model=model, error=UnsupportedModel)


SLIDING = ["full_attention", "sliding_attention", "sliding_attention"] * 2
WINDOW = {"layer_types": SLIDING, "use_sliding_window": True, "sliding_window": 9}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_sliding_windows_span_the_unpruned_sequence(attention, rows):
    model = tiny_model(attention, **WINDOW)
    half, first = Keep(media=Share(0.5)), Keep(audio=Tokens(4), video=Tokens(14))
    plan = Plan((Step(layers="2", method="position", keep=first), Step(layers="4", method="last-query", keep=half)))
    inputs = pad_left(rows)
    out, _ = generate(model, inputs, plan, max_new_tokens=14)
    for b, ids in enumerate(rows):
        n = ids.shape[1]
        audio, video = ids[0] == AUDIO_ID, ids[0] == VIDEO_ID
        keep = [keep_only_first(audio, 4), keep_only_first(video, 14)]
        rules = {2: lambda s, h, k=keep: k[1](s, k[0](s, h)), 4: drop_lowest(audio | video, 0.5)}
        whole = torch.cat([ids, out.sequences[b : b + 1, -14:]], dim=1)
        with torch.no_grad():
            expected = oracle_logits(model, whole, n, rules)[n - 1 : -1]
        assert (torch.stack([step[b] for step in out.logits]) - expected).abs().max() < 1e-4


def test_flash_attention_with_pruned_sliding_layers_is_refused():
    early = Plan((Step(layers="2", method="position", keep=Keep(media=Share(0.5))),))
    refuse("stored keys", lambda: None, model=tiny_model(flash.NAME, **WINDOW), plan=early)


def test_sliding_layers_do_not_score():
    model = tiny_model(layer_types=["sliding_attention"] * 6, use_sliding_window=True, sliding_window=8)
    refuse("within a window", lambda: None, model=model)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UnsupportedModel, match="Qwen2ForCausalLM"), prune(tiny_model(), PLAN):
        pass
