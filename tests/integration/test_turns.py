"""Later turns that bring new media: every step equals the oracle over the whole conversation."""

from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
import torch
from test_shared_keys import DEPTH as SHARING_DEPTH
from test_shared_keys import PLANS as SHARING_PLANS
from test_shared_keys import gemma3n, gemma4
from test_windows import DEPTH as SLIDING_DEPTH
from test_windows import GLOBAL, built
from transformers import DynamicCache

from fastav.budgets import Share
from fastav.cache_argument import as_argument
from fastav.engines.transformers import Pruning, prune
from fastav.errors import PlanError, UnsupportedPlan
from fastav.layout import Layout, Modality
from fastav.method import ENCODER_SIGNALS, Method, Signal, View
from fastav.plan import Keep, Plan, Step
from fastav.presets import NONE, plus
from fastav.pruning.rollout import LayerAttention, rollout_row
from fastav.pruning.state import WINDOW
from fastav.recipes import recipe
from fastav.registry import METHODS
from support import flash
from support.cases import PLAN, ROWS
from support.masked import masked_conversation, rules_of
from support.oracle import Evidence, conversation_logits
from support.pairs import pairwise
from support.tiny import TinyAdapter, layout_of, prompt, tiny_model
from support.turns import Conversation, converse, expected, turn_under

ATTENTION = ["sdpa", "eager", flash.NAME]
HALF, MOST = Keep(media=Share(0.5)), Keep(media=Share(0.7))


def steps(*cuts: tuple[int, str, bool], keep: Keep = MOST) -> Plan:
    """Cuts of (layer, method, in the cache alone)."""
    return Plan(tuple(Step(layers=str(at), method=name, keep=keep, cache_only=alone) for at, name, alone in cuts))


PLANS = {
    "fastav": PLAN,
    "fastav-plus": plus(),
    "fastv": recipe("fastv"),
    "every attention": steps((1, "window", False), (3, "rollout", False), (4, "text-queries", False)),
    "caches": steps((2, "dart", True), (3, "position", False), (3, "last-query", True), (5, "window", True)),
    "the layer about to run": steps(
        (0, "own-last-query", False),
        (2, "last-query", False),
        (2, "own-text-queries", False),
        (2, "own-last-query", True),
        (3, "last-query", False),
        (4, "own-last-query", False),
    ),
    "earlier caches": Plan(
        (
            Step(layers="1", method="position", keep=MOST),
            Step(layers="2..3", method="last-query", keep=MOST, earlier_caches=True),
            Step(layers="3", method="own-last-query", keep=MOST),
            Step(layers="4", method="window", keep=MOST, cache_only=True),
            Step(layers="5", method="position", keep=HALF),
        )
    ),
}
BY_METHOD = {name: steps((2, name, False), (4, name, False)) for name in METHODS if name != "given"}
TEXT = prompt(video=0, audio=0, before=4, after=0, seed=9)
MEDIA = [prompt(seed=1), prompt(before=2, video=12, audio=7, after=4, seed=4)]
CONVERSATIONS = {"1 and 3": [MEDIA[0], TEXT, MEDIA[1]], "1 and 2": [*MEDIA, TEXT], "2": [TEXT, *MEDIA[:1], TEXT]}
MORE_ROWS = [
    prompt(before=1, video=8, audio=10, after=3, seed=11),
    prompt(before=4, video=16, audio=0, after=5, seed=12),
    prompt(before=2, video=0, audio=0, after=1, seed=13),
]
RAGGED = [ROWS, [TEXT, TEXT[:, :2], TEXT[:, 1:]], MORE_ROWS]


def pruned(model: Any, plan: Plan, turns: Any, answers: Any, **options: Any) -> Conversation:
    with prune(model, plan, adapter=TinyAdapter(), scores=(options.get("scores") or [None])[0]) as pruning:
        return converse(model, pruning, turns, answers, **options)


def assert_exact(model: Any, plan: Plan, said: Conversation, scores: Any = None) -> None:
    for row, answers in enumerate(said.logits):
        logits = expected(model, said, row, plan, scores)
        for place, found in answers:
            assert (found - logits[place]).abs().max() < 1e-4
    unpruned = expected(model, said, 0, NONE)
    assert max((found - unpruned[place]).abs().max() for place, found in said.logits[0]) > 1e-2, "nothing is pruned"


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_step_equals_the_oracle(plan, turns, attention):
    assert_conversation_exact(PLANS[plan], turns, attention)


# whatever the method, the same code observes attention and sees which turns bring media
@pytest.mark.parametrize(("attention", "method", "turns"), pairwise(ATTENTION, BY_METHOD, CONVERSATIONS))
def test_every_step_equals_the_oracle_by_every_method(method, turns, attention):
    assert_conversation_exact(BY_METHOD[method], turns, attention)


def assert_conversation_exact(plan: Plan, turns: str, attention: str) -> None:
    model, prompts = tiny_model(attention), [[ids] for ids in CONVERSATIONS[turns]]
    assert_exact(model, plan, pruned(model, plan, prompts, [[3], [2], [3]]))


@pytest.mark.parametrize("plan", [*PLANS, *BY_METHOD])
@pytest.mark.parametrize("attention", ATTENTION)
def test_rows_that_differ_in_every_turn_equal_the_oracle_row_by_row(plan, attention):
    """Prompts are padded on the left, answers that end early on the right, so that padding is between turns."""
    model, answers = tiny_model(attention), [[3, 1, 2], [2, 2, 1], [2, 2, 2]]
    chosen = (PLANS | BY_METHOD)[plan]
    assert_exact(model, chosen, pruned(model, chosen, RAGGED, answers))


def test_layouts_are_read_from_the_ids_of_the_turn():
    model = tiny_model()
    said = pruned(model, PLAN, RAGGED, [[3, 1, 2], [2, 2, 1], [2, 2, 2]], read=True)
    assert_exact(model, PLAN, said)


def test_given_scores_are_of_the_turn():
    model, plan = tiny_model(), steps((2, "given", False))
    scores = [torch.rand(1, ids.shape[1], generator=torch.Generator().manual_seed(i)) for i, ids in enumerate(MEDIA)]
    said = pruned(model, plan, [[ids] for ids in MEDIA], [[2], [2]], scores=scores)
    assert_exact(model, plan, said, [score[0] for score in scores])


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_turn_may_be_one_token(attention):
    model = tiny_model(attention)
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()) as pruning:
        caches = [first_turn(model, pruning) for _ in range(2)]
        with pruning.turn():
            found = model(TEXT[:, :1], **as_argument(caches[0])).logits
        expected = model(TEXT[:, :1], **as_argument(caches[1])).logits
    assert (found - expected).abs().max() < 1e-5


# --- what methods are shown


class Watch(Method):
    """Keeps what it is shown, and scores by position."""

    needs = frozenset(Signal) - {Signal.GIVEN} - ENCODER_SIGNALS

    def score(self, view: View) -> torch.Tensor:
        SHOWN[view.layer] = view
        return -view.position.float()


SHOWN: dict[int, View] = {}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_signals_are_those_of_the_conversation_at_the_new_tokens(monkeypatch, attention):
    monkeypatch.setattr("fastav.pruning.compiled.method_of", lambda step: Watch())
    model, plan, seen = tiny_model(attention), steps((2, "position", False), (4, "position", False)), {}
    said = pruned(model, plan, [[ids] for ids in MEDIA], [[2], [1]])
    (start, end), ids = said.turns[0][1], said.ids[0]

    def watch(layer: int, rule: Any) -> Any:
        def watched(evidence: Evidence, hide: torch.Tensor) -> torch.Tensor:
            left = (start + (~hide).nonzero()[:, 0]).tolist()
            question = [i for i in left if i >= start + 21]  # behind the media
            rollout = torch.eye(len(ids))
            for attention, gone in zip(evidence.maps, evidence.gone, strict=True):
                alone = torch.eye(len(ids))
                rollout = torch.where(gone[:, None], alone, 0.5 * attention + 0.5 * alone) @ rollout
            seen[layer] = {
                Signal.LAST_QUERY: evidence.maps[-1][end - 1][left],
                Signal.TEXT_QUERIES: evidence.maps[-1][question].mean(0)[left],
                Signal.WINDOW: evidence.maps[-1][left[-WINDOW:]].mean(0)[left],
                Signal.OWN_LAST_QUERY: evidence.own[end - 1][left],
                Signal.OWN_TEXT_QUERIES: evidence.own[question].mean(0)[left],
                Signal.ROLLOUT: rollout[end - 1][left],
                Signal.HIDDEN_STATES: evidence.hidden[left],
                Signal.KEYS: evidence.keys[:, left],
            }
            return rule(evidence, hide)

        return watched

    first, second = (turn_under(plan, ids[slice(*span)], span[0], 6) for span in said.turns[0])
    second = replace(second, rules={layer: watch(layer, rule) for layer, rule in second.rules.items()})
    with torch.no_grad():
        conversation_logits(model, ids[None], [first, second])
    for layer, signals in seen.items():
        view = SHOWN[layer]
        assert view.slots.shape[1] == len(signals[Signal.LAST_QUERY])
        for signal, value in signals.items():
            assert (view._read(signal)[0] - value).abs().max() < 1e-4, (layer, signal)
        assert 0 < view[Signal.LAST_QUERY].sum() < 0.99, "earlier tokens have their share"
    assert list(seen) == [2, 4]


@pytest.mark.parametrize("rows", [[MEDIA[0]], ROWS])
def test_keeping_everything_changes_nothing(rows):
    model, everything = tiny_model(), steps((2, "last-query", False), (4, "window", True), keep=Keep(media=Share(1.0)))
    turns, answers = [rows, [TEXT] * len(rows), MORE_ROWS[: len(rows)]], [[2] * len(rows)] * 3
    plain, kept = converse(model, None, turns, answers), pruned(model, everything, turns, answers)
    for ours, theirs in zip(kept.logits, plain.logits, strict=True):
        assert torch.stack([a - b for (_, a), (_, b) in zip(ours, theirs, strict=True)]).abs().max() < 1e-5


# --- what a rollout of the new tokens alone says


def test_no_earlier_token_changes_the_rollout_at_new_tokens():
    """Entries of the dense rollout at a turn's tokens are the product over its own sub-blocks, by causality."""
    torch.manual_seed(0)
    past, new, heads, size = 9, 6, 2, 8
    total, layers, dense = past + new, [], torch.eye(past + new)
    for _ in range(3):
        query, key = torch.randn(1, heads, total, size), torch.randn(1, heads, total, size)
        scores = (query @ key.transpose(-1, -2)).masked_fill(~torch.ones(total, total).bool().tril(), -torch.inf)
        dense = (0.5 * scores.softmax(-1)[0].mean(0) + 0.5 * torch.eye(total)) @ dense
        slots = torch.arange(new)[None]
        key_slots = torch.cat([torch.full((1, past), new), slots], dim=1)
        layers.append(LayerAttention(query[:, :, past:], key, None, 1.0, slots, key_slots, None))
    last = torch.nn.functional.one_hot(torch.tensor([new - 1]), new + 1).float()
    row = rollout_row(layers, last)[0, :new]
    assert (row - dense[-1, past:]).abs().max() < 1e-6
    assert dense[-1, :past].sum() > 0.1, "the last query reads earlier tokens too"


# --- windows and shared keys


def masked(model: Any, depth: int, plan: Plan, said: Conversation) -> torch.Tensor:
    """The logits of a conversation of one row by the model's own code."""
    ids = said.ids[0][None]
    turns = [(start, end, rules_of(plan, layout_of(ids[0, start:end]), depth)) for start, end in said.turns[0]]
    return masked_conversation(
        model, model.model.layers, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, turns
    )


def assert_masked(model: Any, depth: int, plan: Plan, said: Conversation) -> None:
    logits, plain = masked(model, depth, plan, said), masked(model, depth, NONE, said)
    found, places = torch.stack([one for _, one in said.logits[0]]), [place for place, _ in said.logits[0]]
    assert (found - logits[places]).abs().max() < 1e-3 * logits.abs().max()
    assert (found - plain[places]).abs().max() > 1e-2 * logits.abs().max(), "nothing is pruned"


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("style", ["a window for all layers", "by a pattern", "behind some layers"])
def test_a_window_slides_over_cached_and_new_tokens(style, attention, turns):
    model, prompts = built(style, attention), [[ids] for ids in CONVERSATIONS[turns]]
    assert_masked(model, SLIDING_DEPTH, GLOBAL, pruned(model, GLOBAL, prompts, [[3], [2], [3]]))


def test_windows_of_padded_rows_are_the_unpruned_models():
    model, everything = built("every second layer"), steps((1, "position", False), keep=Keep(media=Share(1.0)))
    answers = [[3, 1, 2], [2, 2, 1], [2, 2, 2]]
    plain, kept = converse(model, None, RAGGED, answers), pruned(model, everything, RAGGED, answers)
    for ours, theirs in zip(kept.logits, plain.logits, strict=True):
        assert torch.stack([a - b for (_, a), (_, b) in zip(ours, theirs, strict=True)]).abs().max() < 1e-5


@pytest.mark.parametrize("name", SHARING_PLANS)
@pytest.mark.parametrize("make", [gemma3n, gemma4])
@pytest.mark.parametrize("options", [{}, {"logits_to_keep": 1}, {"logits_to_keep": 3}], ids=["all", "one", "three"])
def test_layers_that_share_keys_read_cached_and_new_ones(make, name, options):
    model, plan = make("sdpa"), SHARING_PLANS[name]
    said = pruned(model, plan, [[ids] for ids in CONVERSATIONS["1 and 3"]], [[2], [2], [2]], **options)
    assert_masked(model, SHARING_DEPTH, plan, said)


# --- records, and what follows a turn


def test_records_hold_for_several_turns():
    model, cache = tiny_model(), DynamicCache(config=tiny_model().config)
    plan = steps((2, "last-query", False), (4, "last-query", True))
    with prune(model, plan, adapter=TinyAdapter()) as pruning:
        said = converse(model, pruning, [[ids] for ids in MEDIA], [[3], [2]], cache=cache)
        second = pruning.tokens(), pruning.slots()
    layouts, depth = [layout_of(ids[0]) for ids in MEDIA], 6
    assert [sum(layer.values()) for layer in second[0][0]] == list(plan.tokens(layouts[1], depth))
    assert int(second[1][-1][1].max()) == MEDIA[1].shape[1] - 1
    held = [sum(counts) + 5 for counts in zip(*(plan.cache_tokens(one, depth) for one in layouts), strict=True)]
    assert [layer.keys.shape[2] for layer in cache.layers] == held
    assert cache.get_seq_length() == len(said.ids[0])
    (_, start), (begin, end) = said.turns[0][0], said.turns[0][1]
    for layer in cache.layers[2:]:
        columns = layer.positions(0)[0].tolist()
        assert columns == sorted(set(columns))
        assert [at for at in columns if start <= at < begin or at >= end] == [*range(start, begin), end, end + 1]
    cache.crop(-2)
    assert cache.get_seq_length() == end
    with pytest.raises(UnsupportedPlan, match="only generated tokens"):
        cache.crop(-1)


def test_generate_continues_with_new_media_and_then_with_text():
    """The last token of an answer has not run yet, so it is the next turn's first."""
    model, options = tiny_model(), {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cache, ids, turns, logits = DynamicCache(config=model.config), torch.zeros(1, 0).long(), [], []
    with prune(model, PLAN, adapter=TinyAdapter()) as pruning:
        for more in (*MEDIA, TEXT):
            start, ids = max(0, ids.shape[1] - 1), torch.cat([ids, more], dim=1)
            turns.append((start, ids.shape[1]))
            with pruning.turn([layout_of(ids[0, start:])]):
                out = model.generate(ids, **as_argument(cache), max_new_tokens=3, **options)
            logits += [(ids.shape[1] - 1 + step, one[0]) for step, one in enumerate(out.logits)]
            ids = out.sequences
    assert_exact(model, PLAN, Conversation([ids[0]], [turns], [logits]))


def test_beams_and_samples_of_a_turn_are_copies_of_it():
    model, cache = tiny_model(), DynamicCache(config=tiny_model().config)
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()) as pruning:
        model(MEDIA[0], **as_argument(cache))
        cache.batch_repeat_interleave(2)
        ids = torch.cat(MEDIA, dim=1)
        with pruning.turn():
            out = model.generate(
                ids,
                **as_argument(cache),
                max_new_tokens=3,
                num_beams=2,
                num_return_sequences=2,
                output_scores=True,
                return_dict_in_generate=True,
            )
    n = ids.shape[1]
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        said = Conversation([sequence], [[(0, MEDIA[0].shape[1]), (MEDIA[0].shape[1], n)]], [[]])
        rows = expected(model, said, 0, PLAN)[n - 1 : -1].log_softmax(-1)
        assert abs(float(rows.gather(1, sequence[n:, None]).sum()) / 3 - float(score)) < 1e-4


# --- what is refused


@pytest.fixture
def begun() -> Any:
    """A model that is being pruned, the pruning, and a cache with a first turn."""
    model = tiny_model()
    with torch.no_grad(), prune(model, PLAN, adapter=TinyAdapter()) as pruning:
        yield model, pruning, first_turn(model, pruning)


def first_turn(model: Any, pruning: Pruning) -> Any:
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), pruning.turn():
        model(MEDIA[0], **as_argument(cache))
    return cache


def text_of(tokens: int) -> Layout:
    return Layout.of(Modality.TEXT, tokens)


def test_media_outside_of_a_turn_are_refused(begun):
    model, pruning, cache = begun
    with pytest.raises(UnsupportedPlan, match=r"would not be pruned \(prefill them in `with pruning.turn"):
        model(MEDIA[1], **as_argument(cache))
    with pytest.raises(UnsupportedPlan, match="inputs_embeds after the first prefill"):
        model(inputs_embeds=model.model.embed_tokens(MEDIA[1]), **as_argument(cache))
    with pruning.turn():  # a refusal leaves nothing behind
        model(MEDIA[1], **as_argument(cache))


def test_a_prefill_that_fails_at_its_first_layer_leaves_the_cache_as_it_was(monkeypatch):
    model = tiny_model()
    with torch.no_grad(), prune(model, plus(), adapter=TinyAdapter()) as pruning:
        cache = first_turn(model, pruning)
        with monkeypatch.context() as broken:
            broken.setattr(model.model.layers[0].self_attn, "forward", _fail)
            with pytest.raises(RuntimeError, match="no memory"), pruning.turn():
                model(MEDIA[1], **as_argument(cache))
        found = model(TEXT, **as_argument(cache)).logits
        whole = first_turn(model, pruning)
        assert torch.equal(found, model(TEXT, **as_argument(whole)).logits)


def _fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no memory")


def test_a_turn_without_a_prefill_is_refused(begun):
    _, pruning, _ = begun
    with pytest.raises(UnsupportedPlan, match="nothing was prefilled"), pruning.turn():
        pass
    with pytest.raises(UnsupportedPlan, match="waiting for its prefill"), pruning.turn(), pruning.turn():
        pass
    with pytest.raises(KeyError), pruning.turn():  # the caller's own error is the one to see
        raise KeyError


REFUSED = {
    "short": ({"layouts": [text_of(10)]}, {}, r"their layouts \[10\]"),
    "many": ({"layouts": [text_of(25)] * 2}, {}, "2 layouts for 1 prompts"),
    "mask": ({}, {"attention_mask": torch.ones_like(MEDIA[1])}, r"25 columns, the cache and the new tokens 36 \+ 25"),
    "padding": ({}, {"attention_mask": torch.ones(1, 61).index_fill(1, torch.tensor([40]), 0)}, "without gaps"),
    "embeds": ({}, {"input_ids": None, "inputs_embeds": torch.zeros(1, 25, 64)}, "do not show which tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_turn_is_refused(begun, case):
    model, pruning, cache = begun
    turn, inputs, reason = REFUSED[case]
    with pytest.raises(UnsupportedPlan, match=reason), pruning.turn(**turn):
        model(**{"input_ids": MEDIA[1], **inputs}, **as_argument(cache))


def test_given_scores_that_do_not_fit_the_turn_are_refused(begun):
    model, pruning, cache = begun
    with pytest.raises(PlanError, match="scores must have the prompts' shape"), pruning.turn(scores=torch.ones(1, 3)):
        model(MEDIA[1], **as_argument(cache))
    with pytest.raises(PlanError, match="must be finite"), pruning.turn(scores=torch.full((1, 25), torch.nan)):
        pass


def test_a_turn_needs_scores_of_its_own():
    plan, scores = steps((2, "given", False)), torch.ones(1, 36)
    pruning = prune(tiny_model(), plan, adapter=TinyAdapter(), scores=scores)
    refused = pytest.raises(UnsupportedPlan, match=r"needs your own scores.*pass scores= to turn")
    with pruning, refused, pruning.turn():
        pass


def test_another_plans_cache_is_refused_in_a_turn_too(begun):
    model, pruning, cache = begun
    pruning.remove()
    other = prune(model, steps((2, "position", False)), adapter=TinyAdapter())
    with other, pytest.raises(UnsupportedPlan, match="without this plan"), other.turn():
        model(MEDIA[1], **as_argument(cache))


def test_a_turn_is_of_one_thread(begun):
    model, pruning, cache = begun
    seen: list[Any] = []
    with pruning.turn():
        other = Thread(target=lambda: seen.append(first_turn(model, pruning)))
        other.start()
        other.join()
        model(MEDIA[1], **as_argument(cache))
    assert seen[0].get_seq_length() == MEDIA[0].shape[1]
    assert cache.get_seq_length() == MEDIA[0].shape[1] + MEDIA[1].shape[1]
