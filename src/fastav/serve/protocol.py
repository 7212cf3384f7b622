"""OpenAI's chat completions as this server takes them: checked requests, and the objects of responses."""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastav.adapter import ModelAdapter
from fastav.client_plans import client_plan
from fastav.decoding.settings import check_settings
from fastav.engine import Answer
from fastav.errors import FastAVError, PlanError
from fastav.layout import Modality
from fastav.plan import Plan
from fastav.serve.limits import Limits

MAX_CHOICES, MAX_TOP_LOGPROBS, MAX_STOPS = 8, 20, 16
MIN_TEMPERATURE = 1e-4  # below, probabilities of sampling overflow

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt_logprobs": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "use_beam_search": (None, False),
}
"""Fields that this server does not have, with the values that change nothing."""

NOTES = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "user",
    "verbosity",
)
"""Fields about the client, which have no effect on an answer."""


class InvalidRequest(FastAVError):
    """A request that cannot be answered as it is.  param: the field that is wrong, if it is one."""

    def __init__(self, message: str, hint: str = "", param: str | None = None) -> None:
        super().__init__(message, hint)
        self.param = param


class UnknownModel(FastAVError):
    """A request names a model that is not served."""


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StreamOptions(_Fields):
    """What a stream has besides text."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: bool = False


class MediaOptions(_Fields):
    """The part of vLLM's `mm_processor_kwargs` that chooses the tracks of a video."""

    use_audio_in_video: bool | None = None
    use: Literal["auto", "both", "video"] | None = None


class Extras(_Fields):
    """vLLM's `vllm_xargs`."""

    fastav: str | dict[str, Any] | None = None


class ChatRequest(_Fields):
    """The body of a chat completion.  Fields as in OpenAI's API; those after `fastav` as in vLLM's."""

    model: str
    messages: list[dict[str, Any]]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    fastav: str | dict[str, Any] | None = None
    vllm_xargs: Extras | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0)
    mm_processor_kwargs: MediaOptions | None = None

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether the last chunk of a stream has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def use(self) -> str:
        """Which tracks of videos are shown."""
        options = self.mm_processor_kwargs
        if options is None:
            return "auto"
        if options.use is not None:
            return options.use
        return {None: "auto", True: "both", False: "video"}[options.use_audio_in_video]

    def plan(self, adapter: ModelAdapter, default: Plan) -> Plan:
        """The plan that the request names, or the server's.  Raises: PlanError, UnknownName."""
        named = [value for value in (self.fastav, self.vllm_xargs and self.vllm_xargs.fastav) if value is not None]
        if not named:
            return default
        if len(named) > 1 and named[0] != named[1]:
            raise PlanError("fastav and vllm_xargs.fastav name two plans", "leave one of them out")
        spec = named[0]
        return client_plan(spec if isinstance(spec, str) else _json(spec), adapter)

    def settings(self, limits: Limits, choice: int = 0) -> dict[str, Any]:
        """The settings of `generate` for one of the answers.  What the request leaves out is the model's.

        Raises: InvalidRequest, PlanError.
        """
        wanted = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if None not in (self.max_completion_tokens, self.max_tokens) and self.max_completion_tokens != self.max_tokens:
            raise InvalidRequest("max_tokens and max_completion_tokens differ", "leave one of them out")
        if wanted is not None and wanted > limits.new_tokens:
            raise InvalidRequest(f"an answer may have {limits.new_tokens:,} tokens here, and {wanted:,} are requested")
        settings: dict[str, Any] = {} if wanted is None else {"max_new_tokens": wanted}
        if self.min_tokens:
            settings["min_new_tokens"] = self.min_tokens
        if self.repetition_penalty is not None:
            settings["repetition_penalty"] = self.repetition_penalty
        if stops := [self.stop] if isinstance(self.stop, str) else list(self.stop or ()):
            if len(stops) > MAX_STOPS or any(len(text) > 1000 for text in stops):
                raise InvalidRequest(f"stop takes {MAX_STOPS} texts of up to 1,000 characters")
            settings["stop_strings"] = stops
        return check_settings(settings | self._sampling(choice))

    def _sampling(self, choice: int) -> dict[str, Any]:
        """The settings of sampling; seeds of several answers differ."""
        if self.temperature == 0:
            return {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature is not None and self.temperature < MIN_TEMPERATURE:
            raise InvalidRequest(f"temperature must be 0 or at least {MIN_TEMPERATURE}", "0 decodes greedily")
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0
        seeded = {} if self.seed is None else {"seed": (self.seed + choice) % 2**63}
        if not given:
            return seeded
        # as in OpenAI's API, what is left out beside a temperature does not restrict the choice of tokens
        return {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0} | given | seeded


def parse(body: Any) -> ChatRequest:
    """The request in a body of JSON.  Raises: InvalidRequest for the first fault, with the name of its field."""
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object", 'such as {"model": "...", "messages": [...]}')
    fields: dict[str, Any] = {}
    for name, value in body.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise InvalidRequest(f"{name} is not supported by this server", "leave it out", name)
        elif name not in NOTES:
            fields[name] = value
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        message, param = _first_fault(error)
        raise InvalidRequest(message, param=param) from None
    if not request.messages:
        raise InvalidRequest("there are no messages", "send one of the role user", "messages")
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs", 'set "logprobs": true', "top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream", 'set "stream": true', "stream_options")
    return request


def _first_fault(error: ValidationError) -> tuple[str, str]:
    """What is wrong, and in which field."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part)[:80] for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{place} is not a field that this server knows", place
    return f"{place}: {fault['msg'][:1].lower()}{fault['msg'][1:]}", place


def _json(plan: Mapping[str, Any]) -> str:
    return json.dumps(plan)


# --- responses


def new_id() -> str:
    """The id of a chat completion."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def usage(answers: Sequence[Answer], warnings: Sequence[str]) -> dict[str, Any]:
    """The usage of a request, with what the plan saved.  answers: its choices, which share a prompt."""
    first = answers[0]
    prompt, completion = sum(first.prompt_tokens.values()), sum(len(answer.token_ids) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {f"{m.label}_tokens": first.prompt_tokens.get(m.label, 0) for m in Modality},
        "fastav": {
            "plan": first.plan,
            "prompt_tokens": dict(first.prompt_tokens),
            "tokens_per_layer": [dict(layer) for layer in first.tokens_per_layer],
            "flops": first.flops.to_dict(),
            "kv_bytes": first.kv_bytes.to_dict(),
            "seconds": {name: round(value, 6) for name, value in first.seconds.items()},
            "warnings": list(warnings),
        },
    }


def completion(
    identifier: str,
    model: str,
    answers: Sequence[Answer],
    logprobs: Sequence[list[dict[str, Any]] | None],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """A whole response."""
    return {
        "id": identifier,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None if steps is None else {"content": steps, "refusal": None},
                "finish_reason": answer.finish,
            }
            for index, (answer, steps) in enumerate(zip(answers, logprobs, strict=True))
        ],
        "usage": usage(answers, warnings),
    }


def chunk(
    identifier: str,
    model: str,
    created: int,
    index: int,
    delta: Mapping[str, Any],
    *,
    finish: str | None = None,
    logprobs: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """One piece of a streamed response.  index: of the choice."""
    choice = {
        "index": index,
        "delta": dict(delta),
        "logprobs": None if logprobs is None else {"content": list(logprobs), "refusal": None},
        "finish_reason": finish,
    }
    return _chunk(identifier, model, created, [choice])


def usage_chunk(
    identifier: str, model: str, created: int, answers: Sequence[Answer], warnings: Sequence[str]
) -> dict[str, Any]:
    """The last piece of a streamed response, with the usage."""
    return _chunk(identifier, model, created, []) | {"usage": usage(answers, warnings)}


def _chunk(identifier: str, model: str, created: int, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": identifier,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": choices,
    }
