"""`fastav.Decoding` says what `generate` says, and leaves out none of it."""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextStreamer
from transformers.generation.stopping_criteria import StoppingCriteria

from fastav.budgets import Tokens
from fastav.cache_argument import as_argument
from fastav.engines.transformers import Decoding, prune
from fastav.engines.transformers.generation import loop, sampler
from fastav.engines.transformers.generation.sampler import HostStream, Stop
from fastav.errors import UnsupportedPlan
from fastav.plan import Keep
from fastav.presets import NONE, fastav
from support.cases import PLAN, ROWS, STEPS
from support.tiny import TinyAdapter, pad_left, prompt, tiny_model

BATCH = pad_left(ROWS)
ALONE = {"input_ids": ROWS[0], "attention_mask": torch.ones_like(ROWS[0])}
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def both(
    model: Any,
    inputs: dict[str, Any],
    plan: Any = PLAN,
    *,
    layouts: Any = None,
    capture: bool | None = None,
    **more: Any,
) -> Any:
    """What `generate` returns, and what it returns by our loop, from the same random numbers."""
    options = {"output_logits": True, "return_dict_in_generate": True} | GREEDY | more
    with prune(model, plan, adapter=TinyAdapter(), layouts=layouts):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options)
        torch.manual_seed(0)
        return expected, model.generate(**inputs, **options, custom_generate=Decoding(TinyAdapter(), capture=capture))


def equal(expected: Any, found: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == len(expected.logits)
    assert (torch.stack(found.logits) - torch.stack(expected.logits)).abs().max() < 1e-4


@pytest.mark.parametrize("capture", [False, True], ids=["as it stands", "fixed shapes"])
@pytest.mark.parametrize("inputs", [ALONE, BATCH], ids=["alone", "padded batch"])
@pytest.mark.parametrize("plan", [NONE, PLAN], ids=["unpruned", "pruned"])
class TestChoices:
    """Ways to choose tokens that transformers has."""

    def test_greedy(self, model, plan, inputs, capture):
        equal(*both(model, inputs, plan, capture=capture))

    def test_penalties_and_forbidden_tokens(self, model, plan, inputs, capture):
        options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "bad_words_ids": [[7]]}
        equal(*both(model, inputs, plan, capture=capture, **options))

    def test_draws_from_the_same_random_numbers(self, model, plan, inputs, capture):
        options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 20, "num_return_sequences": 3}
        expected, found = both(model, inputs, plan, capture=capture, **options)
        equal(expected, found)
        assert len({tuple(row) for row in found.sequences.tolist()}) > len(inputs["input_ids"])

    def test_rows_that_end_are_padded(self, model, plan, inputs, capture):
        whole, _ = both(model, inputs, plan, capture=capture)
        end = whole.sequences[0, inputs["input_ids"].shape[1] + 2].item()  # the first row's third token
        expected, found = both(model, inputs, plan, capture=capture, eos_token_id=end, pad_token_id=0)
        equal(expected, found)
        assert (found.sequences == end).any()


def test_a_long_answer_outgrows_its_buffers(model, monkeypatch):
    monkeypatch.setattr(loop, "ROOM", 8)
    for capture in (False, True):
        for inputs in (ALONE, BATCH):
            equal(*both(model, inputs, capture=capture, max_new_tokens=30))


def test_windows_slide_over_what_was_pruned(monkeypatch):
    model = tiny_model(use_sliding_window=True, sliding_window=12, max_window_layers=4)
    monkeypatch.setattr(loop, "ROOM", 8)
    for plan in (NONE, fastav(Keep(audio=Tokens(4), video=Tokens(14)), drop=0)):
        for capture in (False, True):
            for inputs in (ALONE, BATCH):
                equal(*both(model, inputs, plan, capture=capture, max_new_tokens=20))


def test_a_step_of_fixed_shapes_serves_other_prompts(model, monkeypatch):
    monkeypatch.setattr(loop, "_steps", type(loop._steps)())
    equal(*both(model, ALONE, capture=True))
    (first,) = loop._steps[model].values()
    shorter = {name: value[:, 3:] for name, value in ALONE.items()}
    equal(*both(model, shorter, capture=True))
    assert list(loop._steps[model].values()) == [first]
    equal(*both(model, BATCH, capture=True))
    assert len(loop._steps[model]) == 2


def test_few_captured_steps_are_held(model, monkeypatch):
    monkeypatch.setattr(loop, "_steps", type(loop._steps)())
    for batch in range(1, loop.MAX_STEPS + 3):
        both(model, {name: value.repeat(batch, 1) for name, value in ALONE.items()}, capture=True)
    assert len(loop._steps[model]) == loop.MAX_STEPS


def test_what_was_captured_goes_with_the_model():
    model = tiny_model()
    both(model, ALONE, capture=True)
    assert model in loop._steps
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_embedded_prompts_are_decoded(model):
    inputs = {"inputs_embeds": model.get_input_embeddings()(ROWS[0]).detach()}
    expected, found = both(model, inputs, layouts=TinyAdapter().layouts(None, ALONE))
    equal(expected, found)
    assert found.sequences.shape == (1, STEPS)


def test_a_prompt_may_ask_for_one_token(model):
    equal(*both(model, ALONE, max_new_tokens=1))


class _AfterTwo(StoppingCriteria):
    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.prompt + 2)


def test_criteria_of_the_caller_hold(model):
    expected, found = both(model, ALONE, stopping_criteria=[_AfterTwo(ROWS[0].shape[1])])
    equal(expected, found)
    assert found.sequences.shape[1] == ROWS[0].shape[1] + 2


class _Letters:
    """Says token 1 as a, 2 as b, ..."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(chr(96 + int(one)) for one in ids)


def test_a_streamer_gets_the_prompt_and_every_token(model):
    seen = []
    streamer = TextStreamer(_Letters(), skip_prompt=False)
    streamer.put = seen.append
    streamer.end = lambda: seen.append("end")
    out = model.generate(**ALONE, **GREEDY, custom_generate=Decoding(TinyAdapter(), streamer=streamer))
    assert torch.equal(seen[0], ROWS[0])
    assert torch.cat([piece.view(-1) for piece in seen[:-1]]).tolist() == out[0].tolist()
    assert seen[-1] == "end"


def test_a_stop_text_ends_a_row_and_all_rows_end_the_batch(model):
    whole = model.generate(**ALONE, **GREEDY)[0, ROWS[0].shape[1] :].tolist()
    mark = _Letters().decode(whole[1:3])
    length = _Letters().decode(whole).index(mark) + 2
    out = model.generate(**ALONE, **GREEDY, custom_generate=Decoding(TinyAdapter(), stop=Stop(_Letters(), [mark])))
    assert out[0, ROWS[0].shape[1] :].tolist() == whole[:length]


def test_a_row_that_stopped_stays_so_while_others_go_on(model):
    words = [Stop(_Letters(), []).cut(row)[1] for row in model.generate(**BATCH, **GREEDY)[:, -STEPS:].tolist()]
    first = next(word for word in words if word[1] not in "".join(other for other in words if other != word))
    marks = [first[1], *(word[3:5] for word in words if word != first)]
    out = model.generate(**BATCH, **GREEDY, custom_generate=Decoding(TinyAdapter(), stop=Stop(_Letters(), marks)))
    said = [_Letters().decode(row) for row in out[:, BATCH["input_ids"].shape[1] :].tolist()]
    assert all(any(mark in text for mark in marks) for text in said)
    assert all(whole.startswith(text) for whole, text in zip(words, said, strict=True))
    assert len(said[0]) < STEPS


def test_a_stop_text_is_found_behind_a_long_answer():
    stop = Stop(_Letters(), ["bcd"])
    assert stop.span == 3 + 8
    echo = HostStream(torch.zeros(1, 1, dtype=torch.long), None, stop)
    for one in [1] * 40 + [2, 3]:
        echo.put(torch.tensor([one]), torch.ones(1, dtype=torch.long))
        assert not echo.ended
    echo.put(torch.tensor([4]), torch.ones(1, dtype=torch.long))
    assert echo.ended


def test_what_comes_before_a_stop_text_is_cut_out():
    stop = Stop(_Letters(), ["cd", "d"])
    assert stop.cut([1, 2, 3, 4, 5]) == ([1, 2, 3, 4], "ab", True)
    assert stop.cut([1, 2]) == ([1, 2], "ab", False)
    assert Stop(_Letters(), []).cut([4]) == ([4], "d", False)


class _Late:
    """An event of a device that is as many calls behind as it is told."""

    def __init__(self) -> None:
        self.waited = False

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.waited = True


def test_what_a_device_decodes_too_much_is_not_told(monkeypatch):
    events = []

    def to_host(tensor: Any) -> Any:
        events.append(_Late())
        return tensor, events[-1]

    monkeypatch.setattr(sampler, "_to_host", to_host)
    seen = []
    streamer = TextStreamer(_Letters())
    streamer.put = seen.append
    streamer.end = lambda: None
    echo = HostStream(torch.zeros(2, 3, dtype=torch.long), streamer, None)
    echo._lag = 2
    for step in range(5):
        going = torch.tensor([int(step < 1), int(step < 2)])
        echo.put(torch.full((2,), step), going)
        assert len(events) - sum(event.waited for event in events) <= 2  # the host is never more than that behind
        assert echo.ended == (step >= 4)
    assert echo.finish() == 3
    assert [piece.tolist() for piece in seen[1:]] == [[0, 0], [1, 1], [2, 2]]


# --- caches that go on


class _Behind(HostStream):
    """Learns of every step two steps late."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lag = 2


class _Unread:
    """An event that has not happened yet until someone waits for it."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


GLOBAL = fastav(Keep(audio=Tokens(4), video=Tokens(14)), drop=0)
ENDS = list(range(1, 12))
SLIDING = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3}
MORE = [prompt(before=2, video=12, audio=7, after=4, seed=4), prompt(video=0, audio=0, before=4, after=0, seed=9)]


@pytest.mark.parametrize("capture", [False, True], ids=["as long as needed", "fixed shapes"])
@pytest.mark.parametrize(
    ("plan", "changes"),
    [(PLAN, {}), (NONE, {}), (GLOBAL, SLIDING), (NONE, SLIDING)],
    ids=["pruned", "unpruned", "pruned, sliding", "unpruned, sliding"],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_conversation_over_a_kept_cache_is_that_of_generate(monkeypatch, plan, changes, capture, rows):
    """Four turns, new media in the second and the last; rows end at other steps, and the host learns that late."""
    monkeypatch.setattr(loop, "_steps", type(loop._steps)())
    monkeypatch.setattr(loop, "HostStream", _Behind)
    monkeypatch.setattr(sampler, "_to_host", lambda tensor: (tensor, _Unread()))
    model, results, ended = tiny_model(**changes), [], []
    chosen = GREEDY | {"eos_token_id": ENDS, "output_logits": True, "return_dict_in_generate": True}
    for options in ({}, {"custom_generate": Decoding(TinyAdapter(), keep_cache=True, capture=capture)}):
        cache, ids, mask, logits = DynamicCache(config=model.config), *[torch.zeros(rows, 0).long()] * 2, []
        with prune(model, plan, adapter=TinyAdapter()) as pruning:
            for turn in (ROWS[:rows], [MORE[0], *ROWS[:0:-1]][:rows], MORE[1:] * rows, MORE[:1] * rows):
                past = max(0, ids.shape[1] - 1)  # an answer's last token has not run, and begins the next turn
                last = [one[past:][one[past:] != 0][None] for one in ids]
                padded = pad_left([torch.cat(parts, dim=1) for parts in zip(last, turn, strict=True)])
                ids, mask = ids[:, :past], mask[:, :past]
                ids = torch.cat([ids, padded["input_ids"]], dim=1)
                mask = torch.cat([mask, padded["attention_mask"]], dim=1)
                with pruning.turn() if turn[0].max() > 61 else nullcontext():
                    out = model.generate(ids, attention_mask=mask, **as_argument(cache), **chosen, **options)
                logits += out.logits
                answer = out.sequences[:, ids.shape[1] :]
                ended.append(bool((answer == 0).any()))
                ids, mask = out.sequences, torch.cat([mask, (answer != 0).long()], dim=1)
                assert cache.get_seq_length() == ids.shape[1] - 1
        results.append((ids, torch.stack(logits), [layer.keys for layer in cache.layers]))
    (expected, expected_logits, held), (found, logits, kept) = results
    assert rows == 1 or plan is not PLAN or ended[1], "all rows end their second answer at once"
    assert torch.equal(expected, found)
    assert (expected_logits - logits).abs().max() < 1e-4
    for theirs, ours in zip(held, kept, strict=True):
        assert theirs.shape == ours.shape
        assert (theirs - ours).abs().max() < 1e-4


def test_a_cache_that_is_not_kept_is_empty(model):
    cache = DynamicCache(config=model.config)
    model.generate(**ALONE, **GREEDY, **as_argument(cache), custom_generate=Decoding(TinyAdapter()))
    assert cache.get_seq_length() == 0


REFUSED = {
    "beams": ({"num_beams": 2}, "beams"),
    "maps": ({"output_attentions": True}, "maps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_do_is_refused(model, case):
    options, reason = REFUSED[case]
    with pytest.raises(UnsupportedPlan, match=reason):
        model.generate(**ALONE, **GREEDY, **options, custom_generate=Decoding(TinyAdapter()))


def test_a_streamer_that_transformers_would_lose_is_refused(model):
    streamer = TextStreamer(_Letters())
    with prune(model, PLAN, adapter=TinyAdapter()), pytest.raises(UnsupportedPlan, match="pass it to"):
        model.generate(**ALONE, **GREEDY, streamer=streamer, custom_generate=Decoding(TinyAdapter()))


def test_custom_code_of_others_is_still_refused(model):
    with prune(model, PLAN, adapter=TinyAdapter()), pytest.raises(UnsupportedPlan, match="custom generation"):
        model.generate(**ALONE, **GREEDY, custom_generate=lambda *args, **kwargs: None)


def test_attention_is_as_before_afterwards(model):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(vars(ALL_ATTENTION_FUNCTIONS))
    both(model, ALONE)
    assert vars(ALL_ATTENTION_FUNCTIONS) == before


# --- what a review found


def test_a_broken_prompt_leaves_nothing_behind(model, monkeypatch):
    monkeypatch.setattr(loop, "_steps", type(loop._steps)())
    embeds = model.get_input_embeddings()(ROWS[0]).detach()
    broken = {"inputs_embeds": torch.cat([embeds * torch.nan, embeds], 1)}
    model.generate(**broken, **GREEDY, custom_generate=Decoding(TinyAdapter(), capture=True))
    equal(*both(model, {"inputs_embeds": embeds}, NONE, layouts=TinyAdapter().layouts(None, ALONE), capture=True))
    assert len(loop._steps[model]) == 1


def test_steps_of_other_weights_are_other_steps(monkeypatch):
    monkeypatch.setattr(loop, "_steps", type(loop._steps)())
    model = tiny_model()
    equal(*both(model, ALONE, capture=True))
    model.double()
    equal(*both(model, ALONE, capture=True))
    assert len(loop._steps[model]) == 2
    assert loop.release_steps(model)
    assert not loop.release_steps(model)


def test_buffers_are_given_back_once_they_are_copied(model, monkeypatch):
    monkeypatch.setattr(loop, "ROOM", 4)
    events = []
    plain = loop._decode_step

    @contextmanager
    def watched(*args: Any, **kwargs: Any) -> Any:
        with plain(*args, **kwargs) as stepper:
            number = len(events)
            events.append(("taken", number))
            begin = stepper.begin
            monkeypatch.setattr(stepper, "begin", lambda *a: (begin(*a), events.append(("begun", number)))[0])
            yield stepper
        events.append(("given back", number))

    monkeypatch.setattr(loop, "_decode_step", watched)
    both(model, ALONE, max_new_tokens=10)
    backs = [place for place, (what, _) in enumerate(events) if what == "given back"]
    begins = [place for place, (what, _) in enumerate(events) if what == "begun"]
    assert len(begins) > 2
    assert all(back > begun for back, begun in zip(backs, begins[1:], strict=False))


def test_criteria_get_scores_as_generate_gives_them(model):
    seen: list[Any] = []

    class Looking(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            seen.append(None if scores is None else len(scores))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    both(model, ALONE, stopping_criteria=[Looking()], output_scores=True)
    theirs, ours = seen[:STEPS], seen[STEPS:]
    assert ours == theirs
    seen.clear()
    model.generate(**ALONE, **GREEDY, stopping_criteria=[Looking()], custom_generate=Decoding(TinyAdapter()))
    assert seen == [None] * STEPS


def test_an_offloaded_cache_is_refused(model):
    with pytest.raises(UnsupportedPlan, match="another kind"):
        model.generate(**ALONE, **GREEDY, cache_implementation="offloaded", custom_generate=Decoding(TinyAdapter()))
