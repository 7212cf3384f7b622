"""Ways of generating that stay exact, and ways that are refused in words."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from fastav.budgets import Share, Tokens
from fastav.cache_argument import as_argument
from fastav.engines.transformers import prune
from fastav.errors import PlanError, UnsupportedModel, UnsupportedPlan
from fastav.plan import Keep, Plan, Step
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
        first = model.generate(**INPUTS, **as_argument(cache), max_new_tokens=2, do_sample=False)
        rest = model.generate(
            input_ids=first,
            attention_mask=torch.ones_like(first),
            **as_argument(cache),
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
        model(**inputs, position_ids=inputs["attention_mask"].cumsum(1) - 1, **as_argument(cache))
        more = turn.expand(len(rows), -1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
        positions = mask.cumsum(1)[:, -more.shape[1] :] - 1
        out = model(more, attention_mask=mask, position_ids=positions, **as_argument(cache)).logits
    for b, ids in enumerate(rows):
        with torch.no_grad():
            expected = oracle_logits(model, torch.cat([ids, turn], 1), ids.shape[1], rules_of(ids))[-more.shape[1] :]
        assert (out[b] - expected).abs().max() < 1e-4


def test_the_cache_holds_what_the_plan_says(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()):
        model(**INPUTS, **as_argument(cache))
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
    "uncached": ({"use_cache": False}, "prune again"),
    "guided": ({"guidance_scale": 1.5}, "a second prompt"),
    "static": ({"cache_implementation": "static"}, "different lengths"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_generate_refuses_what_cannot_be_exact(model, case):
    options, reason = REFUSED[case]
    options = {key: model if value == "itself" else value for key, value in options.items()}
    with pytest.raises(UnsupportedPlan, match=reason):
        generate(model, INPUTS, **options)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused_with_its_reason(model, name):
    with prune(model, PLAN, adapter=TinyAdapter()), pytest.raises(UnsupportedPlan, match=f"{name}.*into one row"):
        getattr(model, name)([[1, 2, 3]])
    assert name not in vars(model)


def refuse(reason, call, *, model, error=UnsupportedPlan, plan=PLAN, **options):
    with pytest.raises(error, match=reason), torch.no_grad(), prune(model, plan, adapter=TinyAdapter(), **options):
        call()


def test_forward_refuses_what_cannot_be_exact(model):
    static = StaticCache(config=model.config, max_cache_len=64)
    refuse("StaticCache", lambda: model(**INPUTS, **as_argument(static)), model=model)
    foreign = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :4], **as_argument(foreign))
    refuse("without this plan", lambda: model(IDS[:, 4:], **as_argument(foreign)), model=model)
    refuse("called without its model", lambda: model.model(IDS), model=model)
    embeds = model.model.embed_tokens(IDS)
    refuse("show which tokens are audio", lambda: model(inputs_embeds=embeds), model=model)
    right = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).index_fill(1, torch.tensor([N - 1]), 0)}
    refuse("pad on the left", lambda: model(**right), model=model)
    refuse("without a prompt", lambda: model(), model=model)
    layouts = TinyAdapter().layouts(model.config, INPUTS)
    refuse("do not fit", lambda: model(IDS[:, :8]), model=model, layouts=layouts)


def test_another_plans_cache_is_refused(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()):
        model(**INPUTS, **as_argument(cache))
    other = Plan((Step(layers="5", method="position", keep=Keep(media=Share(0.5))),))
    refuse("without this plan", lambda: model(IDS[:, :1], **as_argument(cache)), model=model, plan=other)


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
    refuse("layer 0 has no preceding layer", lambda: None, model=model, plan=last)
    given = Plan((Step(layers="0", method="given", keep=Keep(media=Share(0.5))),))
    refuse("you passed none", lambda: None, model=model, plan=given)
    bad = torch.full((1, N), torch.nan)
    refuse("must be finite", lambda: None, model=model, plan=given, scores=bad, error=PlanError)
    deep = Plan((Step(layers="6", method="position", keep=Keep(media=Share(0.5))),))
    refuse("do not exist", lambda: None, model=model, plan=deep, error=PlanError)


def test_attention_without_a_tap_is_refused():
    refuse("flex_attention", lambda: None, model=tiny_model("flex_attention"))


def test_layers_that_mix_neighbours_are_refused():
    model = tiny_model()
    model.config.layer_types = ["full_attention"] * 3 + ["linear_attention"] * 3
    refuse("before layer 3: a recurrent state", lambda: None, model=model, error=UnsupportedModel)


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


GREEDY = {"max_new_tokens": 4, "do_sample": False}
FIRST = Keep(audio=Tokens(4), video=Tokens(14))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_cache": False}, "prune again"),
        ({"prompt_lookup_num_tokens": 1}, "draft tokens"),
        ({"prefill_chunk_size": 33}, "chunk"),
        ({"cache_implementation": "static"}, "different lengths"),
    ],
)
def test_no_way_of_saying_it_slips_past_the_guard(settings, reason):
    model = tiny_model()
    bound_before = model.generate
    config = GenerationConfig(**GREEDY, **settings)
    refuse(reason, lambda: model.generate(IDS, config), model=model)
    refuse(reason, lambda: model.generate(IDS, generation_config=config), model=model)
    refuse(reason, lambda: bound_before(IDS, **GREEDY, **settings), model=model)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    refuse(reason, lambda: model.generate(IDS, generation_config=GenerationConfig(**GREEDY)), model=model)


def test_an_assistant_is_refused_however_it_comes():
    model = tiny_model()
    bound_before = model.generate
    refuse("draft", lambda: bound_before(IDS, assistant_model=tiny_model(), **GREEDY), model=model)


def test_holes_in_the_attention_mask_are_refused(model):
    mask = torch.ones_like(IDS)
    mask[0, 1] = 0
    refuse("without gaps", lambda: model(IDS, attention_mask=mask), model=model)


def test_layouts_must_be_those_of_the_prompt(model):
    short = TinyAdapter().layouts(model.config, {"input_ids": IDS[:, 3:]})
    refuse("no attention mask", lambda: model(IDS), model=model, layouts=short)
    refuse("the layouts", lambda: model(**INPUTS), model=model, layouts=short)
    one = TinyAdapter().layouts(model.config, INPUTS)
    refuse("1 layouts for 2 prompts", lambda: model(IDS.repeat(2, 1)), model=model, layouts=one)
    refuse("0 layouts for 1 prompts", lambda: model(IDS), model=model, layouts=[])
    four = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    refuse("does not show padding", lambda: model(IDS, attention_mask=four), model=model)


@pytest.mark.parametrize("audio", [6, 0])
def test_the_last_token_stays_whatever_it_is(model, audio):
    ids = prompt(after=0, audio=audio)
    plan = Plan((Step(layers="3", method="position", keep=Keep(media=Tokens(0))),))
    hidden = ids[0] >= AUDIO_ID
    hidden[-1] = False
    with torch.no_grad(), prune(model, plan, adapter=TinyAdapter()):
        out = model(ids).logits[0, -1]
    with torch.no_grad():
        expected = oracle_logits(model, ids, ids.shape[1], {3: lambda score, hide: hidden})[-1]
    assert (out - expected).abs().max() < 1e-4


def test_a_pruned_cache_is_refused_where_nobody_prunes(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()):
        model(**INPUTS, **as_argument(cache))
    refuse("without this plan", lambda: model(IDS[:, :1], **as_argument(cache)), model=model, plan=Plan())
    with pytest.raises(UnsupportedPlan, match="is used without"), torch.no_grad():
        model(IDS[:, :1], **as_argument(cache))


def test_a_cache_that_a_failed_crop_tore_is_refused(model):
    def tear():
        cache = DynamicCache(config=model.config)
        model(**INPUTS, **as_argument(cache))
        with pytest.raises(UnsupportedPlan, match="only generated tokens"):
            cache.crop(-2)
        model(IDS[:, :1], **as_argument(cache))

    refuse("differ in length", tear, model=model)


def test_what_asks_for_dropped_places_is_refused(model):
    refuse("label", lambda: model(**INPUTS, labels=IDS), model=model)
    refuse("output_hidden_states", lambda: model(**INPUTS, output_hidden_states=True), model=model)
    refuse("output_attentions", lambda: model(**INPUTS, output_attentions=True), model=model)


def test_embeddings_after_the_prefill_are_refused(model):
    def later():
        cache = DynamicCache(config=model.config)
        model(**INPUTS, **as_argument(cache))
        model(inputs_embeds=model.model.embed_tokens(IDS[:, :3]), **as_argument(cache))

    refuse("may hold audio or video", later, model=model)


def test_gradients_of_the_input_are_refused():
    model = tiny_model().requires_grad_(False)
    embeds = model.model.embed_tokens(IDS).requires_grad_()
    layouts = TinyAdapter().layouts(model.config, INPUTS)
    pruned = prune(model, PLAN, adapter=TinyAdapter(), layouts=layouts)
    with pytest.raises(UnsupportedPlan, match="inference_mode"), pruned:
        model(inputs_embeds=embeds)


def test_what_wraps_a_model_is_refused():
    wrapped = torch.nn.Sequential(tiny_model())
    with pytest.raises(UnsupportedModel, match="not a transformers model"), prune(wrapped, PLAN, adapter=TinyAdapter()):
        pass


def test_a_copy_inside_the_context_is_refused():
    model = tiny_model()
    refuse("cannot be copied", lambda: copy.deepcopy(model), model=model)


def test_decoders_that_share_layers_are_pruned_one_at_a_time():
    one, other = tiny_model(), tiny_model(seed=1)
    other.model.layers = one.model.layers
    with prune(one, PLAN, adapter=TinyAdapter()):
        refuse("already", lambda: None, model=other)


def test_a_plan_that_tears_a_pool_is_refused_on_entry(model):
    pooled = Step(layers="2", method="position", keep=Keep(media=Share(0.5)))
    apart = Step(layers="4", method="position", keep=Keep(audio=Tokens(1)))
    refuse("pooled", lambda: None, model=model, plan=Plan((pooled, apart)), error=PlanError)


def test_given_scores_keep_their_precision(model):
    scores = 1 + torch.arange(N, dtype=torch.float64)[None] * 1e-12
    plan = Plan((Step(layers="2", method="given", keep=Keep(all=Tokens(3))),))
    with torch.no_grad(), prune(model, plan, adapter=TinyAdapter(), scores=scores):
        out = model(**INPUTS).logits[0, -1]
    hidden = torch.arange(N) < N - 3
    with torch.no_grad():
        expected = oracle_logits(model, IDS, N, {2: lambda score, hide: hidden})[-1]
    assert (out - expected).abs().max() < 1e-4


def test_given_scores_and_layouts_follow_beams_and_every_cut(model):
    rows = [ROWS[0], ROWS[1]]
    inputs = pad_left(rows)
    scores = torch.rand(2, inputs["input_ids"].shape[1], generator=torch.Generator().manual_seed(3))
    plan = Plan(tuple(Step(layers=at, method="given", keep=Keep(media=Share(0.5))) for at in ("2", "2", "4")))
    layouts = TinyAdapter().layouts(model.config, inputs)
    beams = {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.0, "output_scores": True}
    with prune(model, plan, adapter=TinyAdapter(), scores=scores, layouts=layouts):
        out = model.generate(**inputs, **GREEDY, **beams, return_dict_in_generate=True)
    for index, sequence in enumerate(out.sequences):
        ids = rows[index // 2]
        n, new = ids.shape[1], sequence[-4:]
        row, halve = scores[index // 2, -n:], drop_lowest(ids[0] >= AUDIO_ID, 0.5)
        rules = {2: lambda s, h, r=row, f=halve: f(r, f(r, h)), 4: lambda s, h, r=row, f=halve: f(r, h)}
        with torch.no_grad():
            logits = oracle_logits(model, torch.cat([ids[0], new])[None], n, rules)[n - 1 : -1].log_softmax(-1)
        assert abs(logits.gather(1, new[:, None]).sum() - out.sequences_scores[index]) < 1e-3


def test_last_query_scores_follow_an_earlier_cut_at_the_same_layer(model):
    half = Step(layers="3", method="last-query", keep=Keep(media=Share(0.5)))
    plan = Plan((Step(layers="3", method="position", keep=FIRST), half))
    audio, video = IDS[0] == AUDIO_ID, IDS[0] == VIDEO_ID
    coarse, fine = [keep_only_first(audio, 4), keep_only_first(video, 14)], drop_lowest(audio | video, 0.5)
    with torch.no_grad(), prune(model, plan, adapter=TinyAdapter()):
        out = model(**INPUTS).logits[0, -1]
    with torch.no_grad():
        rules = {3: lambda s, h: fine(s, coarse[1](s, coarse[0](s, h)))}
        assert (out - oracle_logits(model, IDS, N, rules)[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
def test_scores_are_the_row_that_eager_attention_computes(rows):
    model = tiny_model("eager")
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.05  # the model's own, not one over the root of the head's width
    scores, maps = [], []
    attention = model.model.layers[3].self_attn
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()) as pruning:
        attention.register_forward_hook(lambda *_: scores.extend(pruning._running.state.signals.values()))
        attention.register_forward_hook(lambda module, args, out: maps.append(out[1]))
        model(**pad_left(rows))
    assert (scores[0] - maps[0][:, :, -1].mean(1)).abs().max() < 1e-6


def test_a_users_own_hook_on_a_layer_sees_what_the_layer_sees(model):
    shapes = []
    handle = model.model.layers[5].register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape[1]))
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()) as pruning:
        model(**INPUTS)
        assert shapes == [sum(pruning.tokens()[0][5].values())]
    handle.remove()


def test_after_a_failed_forward_the_decoder_by_itself_is_still_refused():
    model = tiny_model()

    def twice():
        handle = model.model.layers[4].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**INPUTS)
        handle.remove()
        model.model(IDS)

    refuse("called without its model", twice, model=model)


@pytest.mark.parametrize("copies", [1, 2])
def test_padding_that_generate_finds_by_itself_is_padding(model, copies):
    inputs = pad_left(ROWS)
    ids = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 0)
    assert all((row != 0).all() for row in ROWS)
    options = {"pad_token_id": 0, "num_return_sequences": copies, "num_beams": copies}
    options |= {"output_logits": False, "return_dict_in_generate": False}
    expected, _ = generate(model, {**inputs, "input_ids": ids}, **options)
    found, _ = generate(model, {"input_ids": ids}, **options)
    assert torch.equal(found, expected)
