"""The settings of a generation: keyword arguments of transformers' `generate`, checked before any work.

A setting is, in this order, what the call says, what its `generation_config` says, and what the model's says.
"""

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from inspect import currentframe
from math import isfinite
from typing import Any, cast

import numpy as np
from transformers import GenerationConfig

from fastav.engine import Sampling
from fastav.errors import FastAVError, PlanError, UnknownName, reason_of
from fastav.registry import unknown_name

MAX_NEW_TOKENS = (
    128  # where neither the call nor the model sets a length; transformers' own default is 20 tokens in all
)

OBJECTS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
"""Settings that are the caller's own code."""

_ARGUMENTS = (*OBJECTS, "generation_config", "assistant_model", "custom_generate", "seed")
_REFUSED = {  # names that `generate` has and a call of a pipeline has not, and what to do instead
    "streamer": "pass on_text=, or use pipe.stream(...)",
    "token_healing": "leave it out: the prompt ends with the chat template's own tokens",
    "tokenizer": "leave it out: the processor's tokenizer is used",
    "num_return_sequences": "ask several times: pipe([clip] * 3, question, do_sample=True)",
    **dict.fromkeys(("inputs", "input_ids", "attention_mask"), "pass a clip and a question"),
    **dict.fromkeys(
        ("negative_prompt_ids", "negative_prompt_attention_mask", "assistant_tokenizer", "synced_gpus"), "leave it out"
    ),
}
_HARMLESS = {"num_return_sequences": (None, 1), "token_healing": (None, False)}  # values that change nothing
_ELSEWHERE = {  # names of vLLM and of OpenAI's interface
    "stop": "stop_strings",
    "stop_token_ids": "eos_token_id",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}


def _plain(value: Any) -> Any:
    """A number of numpy as Python's own."""
    return cast(Any, value).item() if isinstance(value, np.generic) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_RULES: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {  # what a value must be, in code and in words; a hint
    "max_new_tokens": (lambda n: _is_whole(n) and n >= 1, "at least 1", ""),
    "do_sample": (lambda value: isinstance(value, bool), "True or False", ""),
    "temperature": (lambda t: _is_number(t) and t > 0, "more than 0", "do_sample=False decodes greedily"),
    "top_p": (lambda p: _is_number(p) and 0 < p <= 1, "in (0, 1]", ""),
    "top_k": (lambda k: _is_whole(k) and k >= 0, "at least 0", "0 samples from all tokens"),
    "min_p": (lambda p: _is_number(p) and 0 <= p <= 1, "in [0, 1]", ""),
    "repetition_penalty": (lambda x: _is_number(x) and x > 0, "more than 0", "1.0 has no effect"),
    "no_repeat_ngram_size": (lambda n: _is_whole(n) and n >= 0, "at least 0", "0 has no effect"),
    "num_beams": (lambda n: _is_whole(n) and n >= 1, "at least 1", "1 is no beam search"),
    "seed": (lambda n: _is_whole(n) and 0 <= n < 2**63, "in [0, 2**63)", ""),
    "logits_processor": (lambda value: _are_functions(value), "a list of functions of ids and scores", ""),
    "stopping_criteria": (lambda value: _are_functions(value), "a list of functions of ids and scores", ""),
    "prefix_allowed_tokens_fn": (callable, "a function", ""),
    "stop_strings": (lambda value: _are_texts(value), "a text or a list of texts, none empty", ""),
}


def greedy_settings() -> dict[str, Any]:
    """The settings of greedy decoding, with the penalties of the model's generation config.

    The settings of sampling are None, as transformers warns of those that greedy decoding ignores.
    """
    return {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


def check_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a call, with their names and values checked as far as no model is needed.

    `sampling`, a `Sampling`, gives a DeprecationWarning, and becomes the settings that it stands for.
    Raises: UnknownName with the closest names; PlanError for values out of range; FastAVError for names that a pipeline
    does not pass on.
    """
    settings: dict[str, Any] = {name: _plain(value) for name, value in given.items()}
    if (sampling := settings.pop("sampling", None)) is not None:
        settings = _from_sampling(sampling) | settings
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")] + [*_ARGUMENTS, *_REFUSED]
    for name, value in settings.items():
        if name in _ELSEWHERE:
            raise UnknownName(f"no setting of generate is called {name!r}", f"did you mean {_ELSEWHERE[name]!r}?")
        if name not in known:
            raise unknown_name("setting of generate", name, sorted(known))
        if name in _REFUSED and value not in _HARMLESS.get(name, ()):
            raise FastAVError(f"{name} cannot be set in a call of a pipeline", _REFUSED[name])
    config = settings.get("generation_config")
    if not isinstance(config, GenerationConfig | None):
        raise PlanError(f"generation_config must be transformers' GenerationConfig, got {type(config).__name__}")
    if (getattr(config, "num_return_sequences", None) or 1) > 1:
        raise FastAVError("a call of a pipeline gives one answer", _REFUSED["num_return_sequences"])
    for name, (is_met, rule, hint) in _RULES.items():
        for value in (settings.get(name), getattr(config, name, None)):
            if value is not None and not is_met(value):
                raise PlanError(f"{name} must be {rule}, got {value!r}", hint)
    return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """The settings of a call for one model.  Made by `resolve_settings`.

    given: by the caller, checked. config: the `GenerationConfig` that `generate` makes of them and of the model's.
    """

    given: Mapping[str, Any]
    config: Any

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return _texts(self.config.stop_strings)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        end: int | list[int] | None = self.config.eos_token_id
        return () if end is None else (end,) if isinstance(end, int) else tuple(end)

    def new_tokens(self, prompt: int) -> int:
        """The most tokens that an answer to a prompt of this many tokens has.  Raises: PlanError if it has none."""
        if self.config.max_new_tokens is not None:
            return self.config.max_new_tokens
        if self.config.max_length is None:
            return MAX_NEW_TOKENS
        if self.config.max_length <= prompt:
            raise PlanError(
                f"max_length={self.config.max_length} leaves no token for the answer: the prompt has {prompt}",
                "set max_new_tokens instead",
            )
        return self.config.max_length - prompt


def resolve_settings(given: Mapping[str, Any], model: GenerationConfig | None) -> GenerationSettings:
    """The settings of a call, with what the model's generation config says where the call says nothing.

    Raises: as `check_settings`; PlanError for what transformers refuses.
    """
    given = check_settings(given)
    config: Any = GenerationConfig()
    for source in (model, given.get("generation_config")):
        for name, value in vars(source).items() if source is not None else ():
            if value is not None:
                setattr(config, name, deepcopy(value))
    try:
        config.update(**{name: value for name, value in given.items() if name in vars(config)})
    except (ValueError, TypeError) as error:
        raise PlanError(f"transformers does not take these settings: {reason_of(error)}") from error
    if (config.min_new_tokens or 0) > (config.max_new_tokens or float("inf")):
        raise PlanError(
            f"min_new_tokens={config.min_new_tokens} is more than max_new_tokens={config.max_new_tokens}",
            "set both so that an answer is possible",
        )
    return GenerationSettings(given=given, config=config)


def _are_functions(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(callable, cast("list[Any]", value)))


def _are_texts(value: Any) -> bool:
    if not isinstance(value, str | list | tuple):
        return False
    return bool(texts := _texts(value)) and all(map(_is_text, texts))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _texts(value: Any) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _from_sampling(sampling: Any) -> dict[str, Any]:
    if not isinstance(sampling, Sampling):
        raise PlanError(f"sampling must be a fastav.Sampling, got {type(sampling).__name__}")
    settings = sampling.settings()
    words = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)
    warnings.warn_explicit(
        f"sampling= is deprecated and will be removed in fastav 0.4: pass the arguments of generate, here {words}",
        DeprecationWarning,
        *_caller(),
    )
    return settings


def _caller() -> tuple[str, int, str, dict[Any, Any]]:
    """File, line, module and warnings of the innermost frame outside fastav and the wrappers that check types."""
    frame: Any = currentframe()
    while frame.f_globals.get("__name__", "").split(".")[0] in ("fastav", "jaxtyping", "beartype") and frame.f_back:
        frame = frame.f_back
    names = frame.f_globals
    return frame.f_code.co_filename, frame.f_lineno, names["__name__"], names.setdefault("__warningregistry__", {})
