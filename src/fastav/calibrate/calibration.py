"""Tracing prompts one by one, choosing a plan, and answering with it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from fastav.adapter import ModelAdapter
from fastav.batches import attempt
from fastav.calibrate.answers import ANSWERS, MAX_NEW_TOKENS, AnswerPair, evenly_spread
from fastav.calibrate.evidence import Evidence, evidence_of
from fastav.calibrate.prompts import Prompt, prompts_of
from fastav.calibrate.rule import Choice, Criterion, choose
from fastav.calibrate.store import Record, Store
from fastav.calibrate.thumbnail import make_preview
from fastav.decoding.settings import greedy_settings
from fastav.device import resolve_device
from fastav.engine import Answer
from fastav.errors import CalibrationError, FastAVError, reason_of
from fastav.flops import DecoderShape, kv_bytes
from fastav.media import Clip
from fastav.pipelines import Pipeline, pipeline, resolve
from fastav.plan import Plan
from fastav.presets import NONE
from fastav.provenance import provenance
from fastav.pruning.rollout import ALPHA
from fastav.request import Request


@dataclass(frozen=True, slots=True)
class Failure:
    """A prompt that could not be traced or answered, and why."""

    prompt: Prompt
    reason: str


class Calibration:
    """Prompts, a model, and the folder that stores their traces.  Made by `Calibration.of`.

    prompts: in order. shape: of the model's decoder.
    """

    def __init__(
        self,
        model: str,
        adapter: ModelAdapter,
        shape: DecoderShape,
        prompts: list[Prompt],
        store: Store,
        *,
        alpha: float,
        device: str,
        dtype: str,
    ) -> None:
        self.model, self.adapter, self.shape, self.prompts, self.store = model, adapter, shape, prompts, store
        self.alpha, self._device, self._dtype = alpha, device, dtype
        self._pipeline: Pipeline | None = None
        self._evidence: tuple[list[Prompt], Evidence] | None = None

    @classmethod
    def of(
        cls,
        model: str,
        clips: Sequence[str | Path],
        questions: Sequence[str] | Mapping[str, Sequence[str]] = (),
        *,
        folder: str | Path,
        alpha: float = ALPHA,
        device: str | None = None,
        dtype: str | None = None,
    ) -> "Calibration":
        """A new calibration, or the one in this folder to continue.

        model, device, dtype: as for `fastav.pipeline`. clips, questions: as for `prompts_of`. folder: stores the
        traces, so that no prompt is traced twice. alpha: of the rollout.

        Raises: CalibrationError if the folder has another calibration; as `prompts_of`, `fastav.pipelines.resolve`.
        """
        if not 0 < alpha <= 1:
            raise CalibrationError(f"alpha must be in (0, 1], got {alpha:g}", "0.5 is usual")
        prompts = prompts_of(clips, questions)
        adapter, _, config = resolve(model)
        placement, dtype = resolve_device(device, dtype)
        shape = adapter.shape(config)
        store = Store(Path(folder))
        store.begin(
            {
                "model": adapter.name,
                "source": model,
                "layers": shape.layers,
                "hidden": shape.hidden,
                "alpha": alpha,
                "dtype": dtype,
                "device": placement.type,
            }
        )
        return cls(model, adapter, shape, prompts, store, alpha=alpha, device=str(placement), dtype=dtype)

    def remaining(self) -> list[Prompt]:
        """The prompts without a trace."""
        return [prompt for prompt in self.prompts if not self.store.has(prompt.key)]

    def run(self, *, keep_going: bool = False) -> Iterator[Prompt | Failure]:
        """Trace the remaining prompts, one after another.

        keep_going: yield failures instead of raising them. Raises: CalibrationError with the clip's name and the
        original error as its cause; as `fastav.pipeline`; OSError if a trace cannot be written.
        """
        if remaining := self.remaining():
            self._pipe()  # an error while loading the model is no failure of a clip
        for prompt in remaining:
            try:
                record = self._trace(prompt, NONE)
            except Exception as error:
                is_known = isinstance(error, FastAVError)
                reason = " ".join((error.message if is_known else reason_of(error, with_type=True)).split())
                failure = Failure(prompt, reason)
                if not keep_going:
                    raise CalibrationError(f"{prompt.clip.name}: {reason}", error.hint if is_known else "") from error
                yield failure
            else:
                self.store.save(prompt.key, record)
                yield prompt

    def evidence(self) -> Evidence:
        """Statistics over the traced prompts.  Raises: CalibrationError if there are none."""
        traced = self._traced()
        if self._evidence is None or self._evidence[0] != traced:
            self._evidence = traced, evidence_of(self.store.load(prompt.key).trace for prompt in traced)
        if not traced:
            raise CalibrationError("no prompt could be traced", "see why each of them failed")
        return self._evidence[1]

    def choose(self, criterion: Criterion) -> Choice:
        """The plan that follows from the traced prompts, with its origin.  Raises: as `fastav.calibrate.choose`."""
        best, traced = choose(self.evidence(), self.shape, criterion), self._traced()
        origin = provenance(torch.device(self._device)) | {
            "model": self.adapter.name,
            "layers": self.shape.layers,
            "hidden": self.shape.hidden,
            "alpha": self.alpha,
            "clips": len({prompt.clip for prompt in traced}),
            "prompts": len(traced),
            "criterion": asdict(criterion),
            "rule": best.rule,
        }
        return replace(best, plan=replace(best.plan, origin=origin))

    def unanswered(
        self, choice: Choice, *, answers: int = ANSWERS, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> list[Prompt]:
        """The traced prompts that `answer` has to answer: without those whose answers are stored."""
        return [
            prompt
            for prompt in evenly_spread(self._traced(), answers)
            if not self.store.has_pair(_pair_key(prompt, choice.plan, max_new_tokens))
        ]

    def answer(
        self,
        choice: Choice,
        *,
        answers: int = ANSWERS,
        max_new_tokens: int = MAX_NEW_TOKENS,
        keep_going: bool = False,
    ) -> Iterator[Prompt | Failure]:
        """Answer the traced prompts that have no answers yet, greedily, without pruning and with the chosen plan.

        The two alternate, so that other load on the machine affects both alike. Before the first prompt, each answers
        once without being measured.
        choice: of `choose`. answers: prompts at most, evenly spread. keep_going: yield failures instead of raising
        them.
        Raises: CalibrationError with the clip's name; as `fastav.pipeline` and `fastav.batches.attempt`; OSError if
        answers cannot be written.
        """
        remaining = self.unanswered(choice, answers=answers, max_new_tokens=max_new_tokens)
        yield from self._answer_each(remaining, choice.plan, max_new_tokens, keep_going=keep_going)

    def finish(
        self,
        criterion: Criterion | Choice,
        *,
        failures: Sequence[Failure] = (),
        answers: int = ANSWERS,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Choice:
        """Choose a plan, answer the prompts that have no answers yet, and store the result.

        criterion: or what `choose` has returned. failures: of `run` and `answer`; these prompts are not tried again.
        answers: prompts to answer at most, evenly spread; 0 to answer only the one that the report shows.
        Raises: as `choose` and `answer`.
        """
        choice = criterion if isinstance(criterion, Choice) else self.choose(criterion)
        evidence, traced, failed = self.evidence(), self._traced(), {one.prompt.key for one in failures}
        remaining = self.unanswered(choice, answers=answers, max_new_tokens=max_new_tokens)
        remaining = [prompt for prompt in remaining if prompt.key not in failed]
        for _ in self._answer_each(remaining, choice.plan, max_new_tokens, keep_going=False):
            pass
        pairs = {
            prompt.key: key
            for prompt in evenly_spread(traced, answers)
            if self.store.has_pair(key := _pair_key(prompt, choice.plan, max_new_tokens))
        }
        kv = mean(
            kv_bytes(self.shape, choice.plan.cache_tokens(layout, self.shape.layers))
            / kv_bytes(self.shape, [len(layout)] * self.shape.layers)
            for layout in evidence.layouts
        )
        shown = next((prompt for prompt in traced if prompt.key not in failed), traced[0])
        shown_key = f"{shown.key}-{choice.plan.fingerprint}"
        self.store.save(shown_key, self._trace(shown, choice.plan))
        if shown.key in pairs:
            pair = self.store.load_pair(pairs[shown.key])
            shown_answers = [pair.unpruned, pair.pruned]
        else:
            shown_answers = [self._answer(shown, plan, max_new_tokens).to_dict() for plan in (NONE, choice.plan)]
        keys = {prompt.key for prompt in traced}
        comparison = {
            "pairs": list(pairs.values()),
            "traced": len(traced),
            "max_new_tokens": max_new_tokens,
            "failures": [
                (one.prompt.clip.name, one.prompt.question, one.reason) for one in failures if one.prompt.key in keys
            ],
        }
        self.store.finish(
            {
                "plan": choice.plan.to_json(),
                "rule": choice.rule,
                "start": choice.start,
                "held": choice.held,
                "flops": choice.flops,
                "tokens": choice.tokens,
                "prompts": [prompt.key for prompt in traced],
                "shown": shown_key,
                "failures": [
                    {"clip": str(one.prompt.clip), "reason": one.reason}
                    for one in failures
                    if one.prompt.key not in keys
                ],
                "kv": kv,
                "answers": shown_answers,
                "comparison": comparison if answers else None,
            }
        )
        return choice

    def _answer_each(
        self, prompts: Sequence[Prompt], plan: Plan, max_new_tokens: int, *, keep_going: bool
    ) -> Iterator[Prompt | Failure]:
        if not prompts:
            return
        self._pipe()  # an error while loading the model is no failure of a clip
        machine = provenance(torch.device(self._device))["machine"]
        for one in (NONE, plan):
            attempt(partial(self._answer, prompts[0], one, 2))  # the first run of a plan is slower
        for prompt in prompts:
            outcome = attempt(partial(self._pair, prompt, plan, max_new_tokens, machine))
            if isinstance(outcome, FastAVError):
                reason = " ".join(outcome.message.split())
                if not keep_going:
                    raise CalibrationError(f"{prompt.clip.name}: {reason}", outcome.hint) from outcome
                yield Failure(prompt, reason)
            else:
                self.store.save_pair(_pair_key(prompt, plan, max_new_tokens), outcome)
                yield prompt

    def _traced(self) -> list[Prompt]:
        return [prompt for prompt in self.prompts if self.store.has(prompt.key)]

    def _pipe(self) -> Pipeline:
        if self._pipeline is None:
            self._pipeline = pipeline(self.model, NONE, device=self._device, dtype=self._dtype)
        return self._pipeline

    def _trace(self, prompt: Prompt, plan: Plan) -> Record:
        clip = Clip.open(prompt.clip)
        trace = self._pipe().engine.trace(Request(clip=clip, question=prompt.question), plan, alpha=self.alpha)
        return Record(clip=prompt.clip.name, question=prompt.question, trace=trace, preview=make_preview(clip, trace))

    def _pair(self, prompt: Prompt, plan: Plan, max_new_tokens: int, machine: Mapping[str, Any]) -> AnswerPair:
        unpruned, pruned = (self._answer(prompt, one, max_new_tokens).to_dict() for one in (NONE, plan))
        return AnswerPair(
            clip=prompt.clip.name, question=prompt.question, machine=machine, unpruned=unpruned, pruned=pruned
        )

    def _answer(self, prompt: Prompt, plan: Plan, max_new_tokens: int) -> Answer:
        settings = {**greedy_settings(), "max_new_tokens": max_new_tokens}
        return self._pipe()(prompt.clip, prompt.question, plan=plan, **settings)


def _pair_key(prompt: Prompt, plan: Plan, max_new_tokens: int) -> str:
    return f"{prompt.key}-{plan.fingerprint}-{max_new_tokens}"
