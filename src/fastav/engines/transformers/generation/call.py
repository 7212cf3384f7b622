"""One call of `generate`: its settings, and which loop decodes."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from fastav.adapter import ModelAdapter
from fastav.decoding.settings import MAX_NEW_TOKENS, OBJECTS, GenerationSettings, resolve_settings
from fastav.decoding.stopping import Stop
from fastav.decoding.streaming import BatchStream, Stream
from fastav.engines.transformers.generation.loop import Decoding
from fastav.engines.transformers.guards import refuse_settings
from fastav.engines.transformers.timing import Phases
from fastav.errors import FastAVError, PlanError, UnsupportedPlan, reason_of

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of `generate` with checked settings.  Made by `checked_call`.

    settings: of the call and the model. own_loop: whether `fastav.Decoding` decodes, else transformers.
    """

    settings: GenerationSettings
    own_loop: bool

    def check_streams(self) -> None:
        """Raise PlanError if the text is known only at the end."""
        if (self.settings.config.num_beams or 1) > 1:
            raise PlanError("beams have no text before the end, so they cannot stream", "remove num_beams")

    @contextmanager
    def running(self, phases: Phases) -> Generator[None]:
        """Run `generate`.  phases: of this generation.

        Raises: PlanError for settings that `generate` rejects before the model runs; FastAVError for a kind of cache
        that cannot be used on this machine.
        """
        try:
            yield
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            if phases.has_begun:
                raise
            names = ", ".join(sorted(self.settings.given)) or "the model's generation config"
            raise PlanError(f"generate rejects these settings ({names}): {reason_of(error)}") from error
        except (ImportError, AssertionError) as error:  # of transformers or torch, for a package or a device
            if (kind := self.settings.config.cache_implementation) is None:
                raise
            raise FastAVError(
                f"cache_implementation={kind!r} cannot be used here: {reason_of(error)}", "leave it out"
            ) from error

    def arguments(
        self,
        model: GenerationConfig,
        adapter: ModelAdapter,
        stop: Stop,
        stream: Stream | BatchStream | None,
        *,
        prompt: int,
        keep_cache: bool = False,
    ) -> dict[str, Any]:
        """The keyword arguments of `generate`, besides the model's inputs.

        model: the model's generation config. stop: finds the texts that end an answer, in both loops: transformers'
        own criterion fails with some tokenizers. prompt: the columns of the prompts. keep_cache: whether the cache that
        is passed, too, is to hold the answer.
        """
        arguments = {name: value for name, value in self.settings.given.items() if name != "seed"}
        changes: dict[str, Any] = {}
        if self.settings.config.max_new_tokens is None and self.settings.config.max_length is None:
            changes["max_new_tokens"] = MAX_NEW_TOKENS
        if stop.texts:
            changes["stop_strings"] = None
        if (own := arguments.get("generation_config")) is None:
            arguments |= changes
        else:  # transformers warns of arguments next to a generation config
            arguments["generation_config"] = own = copy(own)
            vars(own).update(changes)
            arguments |= {name: None for name in changes if name in arguments or getattr(model, name) is not None}
        if self.own_loop:
            return arguments | {"custom_generate": Decoding(adapter, streamer=stream, stop=stop, keep_cache=keep_cache)}
        ends: list[Any] = [_StopTexts(stop, prompt)] if stop.texts else []
        ends += [_Abandoned(stream)] if isinstance(stream, BatchStream) else []
        if ends:
            criteria = [*(arguments.get("stopping_criteria") or ()), *ends]
            arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
        return arguments if stream is None else arguments | {"streamer": stream}


class _StopTexts(StoppingCriteria):
    """Ends a row with the token that completes a stop text."""

    def __init__(self, stop: Stop, prompt: int) -> None:
        self._stop, self._prompt = stop, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        last = input_ids[:, self._prompt :][:, -self._stop.span :].tolist()
        return torch.tensor([self._stop.reached(row) for row in last], device=input_ids.device)


class _Abandoned(StoppingCriteria):
    """Ends a row for which nobody waits any more."""

    def __init__(self, stream: BatchStream) -> None:
        self._stream = stream

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.tensor(self._stream.abandoned, device=input_ids.device)


def checked_call(given: Mapping[str, Any], model: GenerationConfig, *, streams: bool = False) -> Call:
    """A call with these settings on a model with this generation config.

    streams: whether the text is wanted before the end.
    Raises: as `resolve_settings`; UnsupportedPlan for what cannot be exact while pruning; PlanError for beams that
    stream.
    """
    settings = resolve_settings(given, model)
    config = settings.config
    refuse_settings(lambda name: settings.given.get(name, getattr(config, name, None)))
    if (mode := config.get_generation_mode()) not in _MODES:
        raise UnsupportedPlan(
            f"{mode.value} cannot be exact while pruning: transformers runs code from the hub for it, "
            "which may not keep the cache",
            "use greedy decoding, sampling or beams",
        )
    call = Call(settings=settings, own_loop=_uses_own_loop(settings))
    if streams:
        call.check_streams()
    return call


def _uses_own_loop(settings: GenerationSettings) -> bool:
    """Whether `fastav.Decoding` decodes: where it gives the tokens of `generate` for these settings.

    transformers' own loop runs what `Decoding` does not support, and all code of the caller: on a GPU `Decoding` may
    call that for some tokens after the last.
    """
    has_code = any(settings.given.get(name) is not None for name in OBJECTS)
    return not has_code and Decoding.unsupported(settings.config) is None


def until_end(ids: list[int], call: Call, stop: Stop) -> tuple[Sequence[int], str, bool]:
    """The tokens of an answer and its text, and whether an end marker or a stop text ended it."""
    ends = call.settings.end_tokens
    length = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    if length == len(ids) and call.settings.given.get("stopping_criteria"):
        while length and ids[length - 1] == call.settings.config.pad_token_id:  # of a row that ended before others
            length -= 1
    tokens, text, is_stopped = stop.cut(ids[:length])
    return tokens, text, length < len(ids) or is_stopped


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Generator[None]:
    """Seed torch's generators, and restore their state afterwards.  None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
