"""The settings of `generate` as vLLM's `SamplingParams`."""

from typing import Any

from transformers import GenerationConfig

from fastav.decoding.settings import OBJECTS, GenerationSettings
from fastav.errors import FastAVError, UnsupportedPlan

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0  # that vLLM takes unchanged, besides 0
TOP_K = 50  # of transformers, where nobody sets it

_MAPPED = {
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_strings", "eos_token_id"),
    *("max_new_tokens", "max_length", "min_new_tokens"),
}
_WITHOUT_EFFECT = {  # on the tokens of an answer that vLLM generates
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "pad_token_id", "bos_token_id"),
    *("transformers_version", "renormalize_logits", "early_stopping", "length_penalty", "low_memory"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate"),
    *("compile_config", "disable_compile", "is_assistant"),
}
_NEUTRAL = {  # values that are the same as not to set it
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale"), 1),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty"), 1.0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha"), 0.0),
}


def sampling_arguments(settings: GenerationSettings) -> dict[str, Any]:
    """Arguments of `SamplingParams`, besides the maximum length.

    Raises: UnsupportedPlan for settings, of the call or of the model, that vLLM does not have; FastAVError for a
    temperature that vLLM would change or refuse.
    """
    _refuse_others(settings)
    config, given = settings.config, settings.given
    arguments: dict[str, Any] = {
        "temperature": 0.0,
        "repetition_penalty": float(config.repetition_penalty or 1.0),
        "min_tokens": config.min_new_tokens or 0,
        "seed": given.get("seed"),
        "stop": list(settings.stop_texts),
        "stop_token_ids": list(settings.end_tokens),
        "ignore_eos": True,  # the tokenizer's; those of the settings are named above
    }
    if not config.do_sample:
        return arguments
    temperature = 1.0 if config.temperature is None else config.temperature
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise FastAVError(
            f"vLLM samples at temperatures from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}, got {temperature}",
            "do_sample=False is greedy",
        )
    top_k = TOP_K if config.top_k is None and "top_k" not in given else config.top_k or 0
    return arguments | {
        "temperature": float(temperature),
        "top_p": 1.0 if config.top_p is None else float(config.top_p),
        "top_k": top_k,
        "min_p": float(config.min_p or 0.0),
    }


def _refuse_others(settings: GenerationSettings) -> None:
    """Refuse settings that vLLM does not have, unless they have no effect.  Raises: UnsupportedPlan."""
    config = settings.config
    values = {name: getattr(config, name) for name in vars(GenerationConfig()) if not name.startswith("_")}
    values |= {name: settings.given.get(name) for name in (*OBJECTS, "assistant_model", "custom_generate")}
    for name, value in values.items():
        is_set = value is not None and value is not False and _NEUTRAL.get(name) != value
        if is_set and name not in _MAPPED | _WITHOUT_EFFECT:
            raise UnsupportedPlan(
                f"the engine vllm has no {name}"
                + ("" if name in settings.given else ", which the model's settings ask for"),
                f"leave {name} out, or use engine='transformers'"
                if name in settings.given
                else f"turn it off ({name}={_NEUTRAL.get(name)!r}), or use engine='transformers'",
            )
