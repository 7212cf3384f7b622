"""The settings of `generate` as parameters of vLLM, without vLLM."""

import pytest
from transformers import GenerationConfig

from fastav.decoding.settings import greedy_settings, resolve_settings
from fastav.engines.vllm import offline
from fastav.engines.vllm.sampling import sampling_arguments
from fastav.errors import FastAVError, UnsupportedPlan
from fastav.presets import NONE

MODEL = GenerationConfig(eos_token_id=[2, 5], repetition_penalty=1.05)
GREEDY = {
    "temperature": 0.0,
    "repetition_penalty": 1.05,
    "min_tokens": 0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [2, 5],
    "ignore_eos": True,
}
SAMPLED = GREEDY | {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0}  # transformers' own defaults


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, GREEDY),
        (greedy_settings(), GREEDY),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, GREEDY),
        ({"do_sample": True}, SAMPLED),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 3},
            SAMPLED | {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 3},
        ),
        ({"do_sample": True, "top_k": None}, SAMPLED | {"top_k": 0}),
        ({"do_sample": True, "top_k": 0}, SAMPLED | {"top_k": 0}),
        ({"stop_strings": "end", "min_new_tokens": 4}, GREEDY | {"stop": ["end"], "min_tokens": 4}),
        ({"repetition_penalty": 1.5, "eos_token_id": 7}, GREEDY | {"repetition_penalty": 1.5, "stop_token_ids": [7]}),
        (
            {"generation_config": GenerationConfig(do_sample=True, temperature=0.5), "num_beams": 1},
            SAMPLED | {"temperature": 0.5},
        ),
        ({"no_repeat_ngram_size": 0, "use_cache": True, "output_scores": False}, GREEDY),
    ],
    ids=str,
)
def test_names_are_mapped(settings, expected):
    assert sampling_arguments(resolve_settings(settings, MODEL)) == expected


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"typical_p": 0.9, "do_sample": True}, "typical_p"),
        ({"max_time": 3.0}, "max_time"),
        ({"logits_processor": [print]}, "logits_processor"),
        ({"stopping_criteria": [print]}, "stopping_criteria"),
        ({"prefix_allowed_tokens_fn": print}, "prefix_allowed_tokens_fn"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"assistant_model": "a model"}, "assistant_model"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"use_cache": False, "suppress_tokens": [3]}, "suppress_tokens"),
    ],
    ids=str,
)
def test_others_are_refused_by_name(settings, name):
    with pytest.raises(UnsupportedPlan, match=f"the engine vllm has no {name} .leave {name} out"):
        sampling_arguments(resolve_settings(settings, MODEL))


def test_what_the_model_asks_for_is_refused_unless_the_call_turns_it_off():
    model = GenerationConfig(no_repeat_ngram_size=3)
    with pytest.raises(
        UnsupportedPlan, match=r"which the model's settings ask for .turn it off .no_repeat_ngram_size=0"
    ):
        sampling_arguments(resolve_settings({}, model))
    sampling_arguments(resolve_settings({"no_repeat_ngram_size": 0}, model))


def test_temperatures_that_vllm_would_change():
    with pytest.raises(FastAVError, match=r"temperatures from 0\.01 to 2, got 3"):
        sampling_arguments(resolve_settings({"do_sample": True, "temperature": 3}, MODEL))


@pytest.mark.parametrize("name", ["additional_config", "limit_mm_per_prompt", "model"])
def test_arguments_that_fastav_sets_are_refused(name):
    with pytest.raises(FastAVError, match=f"fastav sets {name} of vllm.LLM itself"):
        offline.start("folder", NONE, model_kwargs={name: {}})
