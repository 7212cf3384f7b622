"""A pipeline takes the keyword arguments of `generate`, and its tokens are those of the model's own `generate`."""

import copy
import importlib
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

import fastav
from fastav.adapter import adapter_for
from fastav.engines.transformers import Decoding, TransformersEngine, prune
from fastav.engines.transformers.generation import call, loop
from fastav.errors import FastAVError, PlanError, UnknownName, UnsupportedPlan
from fastav.media import Clip
from fastav.pipelines import Pipeline
from fastav.request import Request

CLIPS = Path(fastav.__file__).parent / "assets" / "clips"
CLIP, QUESTION = Clip.open(CLIPS / "knock.mp4"), "describe the clip."
LONG = {"max_new_tokens": 12, "min_new_tokens": 12}  # as the model ends its own answers early


class Forbid(LogitsProcessor):
    """A processor of the caller's own."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.index_fill(1, torch.tensor([self.token]), -torch.inf)


class AfterThree(StoppingCriteria):
    """A criterion of the caller's own: a row ends after its third token, the second row of a batch later."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        new = input_ids.shape[1] - self.prompt
        return torch.tensor([new >= 3, *(new >= 6 for _ in input_ids[1:])])


SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {  # and whether our own loop decodes
    "nothing": ({}, True),
    "greedy": ({"do_sample": False}, True),
    "temperature": ({"do_sample": True, "temperature": 2.0, "seed": 3}, True),
    "top_p": ({"do_sample": True, "temperature": 3.0, "top_p": 0.8, "seed": 4}, True),
    "top_k": ({"do_sample": True, "temperature": 5.0, "top_k": 5, "seed": 5}, True),
    "all tokens": ({"do_sample": True, "temperature": 5.0, "top_k": None, "seed": 6}, True),
    "min_p": ({"do_sample": True, "temperature": 5.0, "min_p": 0.01, "seed": 7}, True),
    "typical_p": ({"do_sample": True, "temperature": 5.0, "typical_p": 0.7, "seed": 8}, True),
    "repetition_penalty": ({"repetition_penalty": 8.0}, True),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 2}, True),
    "bad_words_ids": ({"bad_words_ids": [[41], [63, 14]]}, True),
    "suppress_tokens": ({"suppress_tokens": [41, 59]}, True),
    "max_length": ({"max_new_tokens": None, "min_new_tokens": None, "max_length": 146}, True),
    "eos_token_id": ({"min_new_tokens": 2, "eos_token_id": [2, 9, 14]}, True),
    "generation_config": ({"generation_config": GenerationConfig(repetition_penalty=8.0, max_new_tokens=9)}, True),
    "num_beams": ({"num_beams": 4, "no_repeat_ngram_size": 1, "length_penalty": 0.2}, False),
    "beams that are sampled": ({"num_beams": 3, "do_sample": True, "temperature": 3.0, "seed": 9}, False),
    "logits_processor": ({"logits_processor": [Forbid(41)]}, False),
    "prefix_allowed_tokens_fn": ({"prefix_allowed_tokens_fn": lambda _, ids: list(range(3, 30))}, False),
    "max_time": ({"max_time": 1000.0}, True),
}


# Settings are a matter of logits and tokens, which an unpruned cache gives as a pruned one does: one of each kind.
UNPRUNED = {"nothing", "temperature", "repetition_penalty", "eos_token_id", "num_beams", "logits_processor"}


@pytest.fixture(scope="module")
def pipe():
    return fastav.pipeline("tiny", device="cpu")


@pytest.fixture
def loops(monkeypatch) -> list[str]:
    """The loops that decode, in order."""
    used: list[str] = []
    plain = loop.Decoding.__call__

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        used.append("own")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(loop.Decoding, "__call__", own)
    return used


def own_tokens(pipe: Any, settings: dict[str, Any], plan: str = "fastav", question: str = QUESTION) -> list[int]:
    """The tokens of `generate` itself, pruned, up to its end token."""
    settings, engine = dict(settings), pipe.engine
    seed = settings.pop("seed", None)
    prepared = pipe.adapter.prepare(engine.processor, [Request(clip=CLIP, question=question)])
    with prune(engine.model, plan, layouts=prepared.layouts), torch.random.fork_rng([]):
        if seed is not None:
            torch.manual_seed(seed)
        ids = engine.model.generate(**prepared.inputs, **settings)[0, prepared.inputs["input_ids"].shape[1] :].tolist()
    ends = settings.get("eos_token_id", [engine.model.generation_config.eos_token_id])
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


@pytest.mark.parametrize(
    ("name", "plan"),
    [(name, "fastav") for name in SETTINGS]
    + [pytest.param(name, "none", marks=[] if name in UNPRUNED else pytest.mark.slow) for name in SETTINGS],
)
def test_tokens_are_those_of_generate(pipe, loops, name, plan):
    settings, own = SETTINGS[name]
    settings = ({} if "generation_config" in settings else LONG) | settings
    settings = {name: value for name, value in settings.items() if value is not None or name == "top_k"}
    answer = pipe(CLIP, QUESTION, plan=plan, **settings)
    assert loops == ["own"] * own
    assert list(answer.token_ids) == own_tokens(pipe, settings, plan)
    assert answer.plan == plan
    assert [answer.text] == [dict(pipe.map([Request(clip=CLIP, question=QUESTION)], plan=plan, **settings))[0].text]


def test_settings_matter(pipe):
    """Those above are no empty comparison."""
    plain = pipe(CLIP, QUESTION, **LONG).token_ids
    for name in ("temperature", "repetition_penalty", "suppress_tokens", "bad_words_ids", "num_beams"):
        assert pipe(CLIP, QUESTION, **LONG | SETTINGS[name][0]).token_ids != plain, name


def test_a_text_that_stops_is_not_in_the_answer(pipe):
    whole = pipe(CLIP, QUESTION).text
    word = whole.split()[3]
    for settings in ({"stop_strings": [word]}, {"stop_strings": word, "num_beams": 2}):
        answer = pipe(CLIP, QUESTION, **settings)
        assert word not in answer.text
        assert answer.finish == "stop"
    (row,) = (answer for _, answer in pipe.map([Request(clip=CLIP, question=QUESTION)], stop_strings=["no", word]))
    assert row.text == pipe(CLIP, QUESTION, stop_strings=word).text == whole[: whole.index(word)].strip()


def test_texts_that_stop_are_found_where_generate_finds_them():
    module = importlib.import_module("support.families.qwen2_5_omni")
    model, processor = module.build()
    engine = TransformersEngine(model, processor, adapter_for([type(model).__name__]))
    pipe = Pipeline(engine, engine.adapter.preset("fastav"), engine.adapter)
    whole = pipe(CLIP, QUESTION, max_new_tokens=20, do_sample=False)
    for mark in [letter for letter in whole.text if "!" <= letter <= "~"][2:5:2]:
        for beams in (1, 2):
            settings = {"max_new_tokens": 20, "do_sample": False, "num_beams": beams}
            try:
                expected = own_tokens(pipe, settings | {"stop_strings": [mark], "tokenizer": processor.tokenizer})
            except UnsupportedPlan:  # releases of transformers that give beams other frames than the prompt's
                assert beams == 2
                continue
            answer = pipe(CLIP, QUESTION, stop_strings=[mark], **settings)
            assert list(answer.token_ids) == expected
            if beams == 1:
                assert len(expected) < 20
                assert (answer.finish, answer.text) == ("stop", whole.text[: whole.text.index(mark)].strip())


def test_a_criterion_of_the_caller_ends_rows_of_a_batch(pipe):
    requests = [Request(clip=CLIP, question=QUESTION)] * 2
    prompt = pipe.adapter.prepare(pipe.engine.processor, requests).inputs["input_ids"].shape[1]
    settings = LONG | {"stopping_criteria": [AfterThree(prompt)]}
    assert list(pipe(CLIP, QUESTION, **settings).token_ids) == own_tokens(pipe, settings)
    answers = dict(pipe.map(requests, batch=2, **settings))
    assert [len(answers[row].token_ids) for row in range(2)] == [3, 6]
    assert [answers[row].finish for row in range(2)] == ["stop", "stop"]
    assert pipe(CLIP, QUESTION, **LONG).finish == "length"


def test_beams_of_a_batch_are_those_of_single_prompts(pipe):
    questions = [QUESTION, "what sound do you hear?"]
    alone = [pipe(CLIP, question, num_beams=3) for question in questions]
    together = pipe(CLIP, questions, num_beams=3)
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.tokens_per_layer, one.flops) == (other.text, other.tokens_per_layer, other.flops)


def test_the_model_s_generation_config_holds_and_a_call_goes_before_it(pipe):
    engine, before = pipe.engine, pipe.engine.model.generation_config
    changed = copy.deepcopy(before)
    changed.update(do_sample=True, temperature=5.0, max_new_tokens=7, min_new_tokens=7, repetition_penalty=1.3)
    engine.model.generation_config = changed
    try:
        answers = [pipe(CLIP, QUESTION, seed=seed) for seed in (1, 1, 2)]
        assert answers[0].token_ids == answers[1].token_ids != answers[2].token_ids
        assert list(answers[0].token_ids) == own_tokens(pipe, {"seed": 1})
        assert {len(answer.token_ids) for answer in answers} == {7}
        greedy = pipe(CLIP, QUESTION, do_sample=False)
        assert greedy.token_ids == pipe(CLIP, QUESTION, do_sample=False, seed=5).token_ids
        assert list(greedy.token_ids) == own_tokens(pipe, {"do_sample": False})
        config = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=9, min_new_tokens=9)
        assert list(pipe(CLIP, QUESTION, generation_config=config).token_ids) == own_tokens(
            pipe, {"generation_config": config}
        )
        changed.stop_strings = ["square"]
        for more in ({}, {"generation_config": GenerationConfig(do_sample=False)}, {"num_beams": 2}):
            settings = {"do_sample": False} if "generation_config" not in more else {}
            assert pipe(CLIP, QUESTION, **settings | more).text == "a yellow"
    finally:
        engine.model.generation_config = before


def test_a_seed_leaves_the_generator_as_it_was(pipe):
    state = torch.get_rng_state()
    pipe(CLIP, QUESTION, do_sample=True, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_a_length_has_ours(pipe, monkeypatch):
    monkeypatch.setattr(call, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr("fastav.decoding.settings.MAX_NEW_TOKENS", 4)
    answer = pipe(CLIP, QUESTION)
    assert len(answer.token_ids) == 4
    assert answer.finish == "length"
    with pytest.raises(PlanError, match="max_length=3 leaves no token for the answer"):
        pipe(CLIP, QUESTION, max_length=3)


def test_numbers_of_numpy_are_numbers(pipe):
    settings = {"max_new_tokens": 4, "do_sample": True, "temperature": 2.0, "top_k": 8, "seed": 3}
    kinds = (np.int64, np.bool_, np.float32, np.int32, np.uint8)
    same = {name: kind(value) for (name, value), kind in zip(settings.items(), kinds, strict=True)}
    assert pipe(CLIP, QUESTION, **same).token_ids == pipe(CLIP, QUESTION, **settings).token_ids


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temprature": 0.7}, UnknownName, "no setting of generate is called 'temprature' .did you mean 'temperature'"),
        ({"max_tokens": 5}, UnknownName, "did you mean .*max_new_tokens"),
        ({"stop": ["a"]}, UnknownName, "did you mean .*stop_strings"),
        ({"temperature": 0}, PlanError, "temperature must be more than 0, got 0 .do_sample=False decodes greedily"),
        ({"temperature": float("nan")}, PlanError, "temperature must be"),
        ({"temperature": "hot"}, PlanError, "temperature must be"),
        ({"top_p": 1.5}, PlanError, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_k": 2.5}, PlanError, "top_k must be"),
        ({"do_sample": 1}, PlanError, "do_sample must be True or False"),
        ({"max_new_tokens": 0}, PlanError, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": True}, PlanError, "max_new_tokens must be"),
        ({"min_new_tokens": 9, "max_new_tokens": 5}, PlanError, "min_new_tokens=9 is more than max_new_tokens=5"),
        ({"num_beams": 0}, PlanError, "num_beams must be"),
        ({"seed": -1}, PlanError, "seed must be"),
        ({"stop_strings": ["a", ""]}, PlanError, "stop_strings must be"),
        ({"stop_strings": 3}, PlanError, "stop_strings must be"),
        ({"generation_config": {"do_sample": True}}, PlanError, "generation_config must be .* got dict"),
        ({"generation_config": GenerationConfig(temperature=-1.0)}, PlanError, "temperature must be"),
        ({"num_return_sequences": 2, "do_sample": True}, FastAVError, "num_return_sequences cannot be set"),
        ({"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)}, FastAVError, "one answer"),
        ({"token_healing": True}, FastAVError, "token_healing cannot be set"),
        ({"logits_processor": [1]}, PlanError, "logits_processor must be a list of functions"),
        ({"stopping_criteria": print}, PlanError, "stopping_criteria must be a list of functions"),
        ({"prefix_allowed_tokens_fn": 3}, PlanError, "prefix_allowed_tokens_fn must be a function"),
        ({"streamer": print}, FastAVError, "streamer cannot be set .*pass on_text"),
        ({"sampling": {"temperature": 1}}, PlanError, "sampling must be a fastav.Sampling"),
        ({"early_stopping": "no"}, PlanError, "transformers does not take these settings: .*early_stopping"),
        ({"assistant_model": "a model"}, UnsupportedPlan, "assisted decoding"),
        ({"prompt_lookup_num_tokens": 3}, UnsupportedPlan, "prompt lookup"),
        ({"guidance_scale": 1.5}, UnsupportedPlan, "guidance"),
        ({"use_cache": False}, UnsupportedPlan, "without a cache"),
        ({"cache_implementation": "static"}, UnsupportedPlan, "cannot hold layers"),
        ({"custom_generate": "some/repository"}, UnsupportedPlan, "custom generation code"),
        ({"penalty_alpha": 0.6, "top_k": 4}, UnsupportedPlan, "contrastive_search cannot be exact"),
        ({"num_beams": 4, "num_beam_groups": 2}, UnsupportedPlan, "group_beam_search cannot be exact"),
        ({"dola_layers": "low"}, UnsupportedPlan, "dola_generation cannot be exact"),
    ],
    ids=str,
)
def test_one_error_before_any_medium_is_decoded(pipe, monkeypatch, settings, error, message):
    monkeypatch.setattr(type(pipe.adapter), "prepare", lambda *_: pytest.fail("decoded"))
    with pytest.raises(error, match=message):
        pipe(CLIP, QUESTION, **settings)
    with pytest.raises(error, match=message):
        pipe.map([], **settings)


def test_a_name_is_checked_before_the_clip_is_opened(pipe):
    with pytest.raises(UnknownName, match="temperature"):
        pipe("missing.mp4", QUESTION, temprature=1)


def test_beams_do_not_stream(pipe):
    with pytest.raises(PlanError, match="beams have no text before the end"):
        pipe(CLIP, QUESTION, num_beams=2, on_text=print)


# --- the class of before


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        (fastav.Sampling(), {"do_sample": False}),
        (
            fastav.Sampling(temperature=3.0, top_p=0.9, top_k=7, seed=2),
            {"do_sample": True, "temperature": 3.0, "top_p": 0.9, "top_k": 7, "seed": 2},
        ),
        (fastav.Sampling(temperature=3.0, seed=2), {"do_sample": True, "temperature": 3.0, "top_k": 0, "seed": 2}),
        (fastav.Sampling(repetition_penalty=1.8, stop=("the",)), {"repetition_penalty": 1.8, "stop_strings": ["the"]}),
    ],
    ids=str,
)
def test_a_sampling_still_works_and_warns(pipe, sampling, settings):
    with pytest.warns(DeprecationWarning, match=r"sampling= is deprecated .* in fastav 0\.4.* do_sample=") as caught:
        old = pipe(CLIP, QUESTION, sampling=sampling, **LONG)
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="sampling= is deprecated") as caught:
        mapped = dict(pipe.map([Request(clip=CLIP, question=QUESTION)], sampling=sampling, **LONG))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = pipe(CLIP, QUESTION, **settings, **LONG)
    assert old.token_ids == new.token_ids == mapped[0].token_ids


def test_decoding_says_what_it_does_not_support():
    assert Decoding.unsupported(GenerationConfig()) is None
    assert Decoding.unsupported(GenerationConfig(num_beams=2)) == "beams and drafts"
    assert Decoding.unsupported(GenerationConfig(cache_implementation="static")) == "a cache of another kind"


@pytest.mark.parametrize("settings", [{"bad_words_ids": 3}, {"suppress_tokens": "a"}, {"sequence_bias": {}}], ids=str)
def test_settings_that_transformers_rejects_are_one_error(pipe, settings):
    with pytest.raises(PlanError, match=rf"rejects these settings.*{next(iter(settings))}"):
        pipe(CLIP, QUESTION, **settings, **LONG)


@pytest.mark.skipif(find_spec("optimum") is not None, reason="the quantized cache can be used here")
def test_a_cache_whose_package_is_missing_is_one_error(pipe):
    with pytest.raises(FastAVError, match=r"cache_implementation='quantized' cannot be used here: .*quanto") as refused:
        pipe(CLIP, QUESTION, cache_implementation="quantized", **LONG)
    assert refused.value.hint == "leave it out"
