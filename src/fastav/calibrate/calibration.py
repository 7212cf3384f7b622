"""Tracing prompts one by one, and choosing a plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from fastav.adapter import ModelAdapter
from fastav.calibrate.evidence import Evidence, evidence_of
from fastav.calibrate.prompts import Prompt, prompts_of
from fastav.calibrate.rule import Choice, Criterion, choose
from fastav.calibrate.store import Record, Store
from fastav.calibrate.thumbnail import make_preview
from fastav.device import resolve_device
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
    """A prompt that could not be traced, and why."""

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
        evidence = evidence_of(self.store.load(one.key).trace for one in self.prompts if self.store.has(one.key))
        if not evidence.layouts:
            raise CalibrationError("no prompt could be traced", "see why each of them failed")
        return evidence

    def finish(self, criterion: Criterion, *, failures: Sequence[Failure] = (), max_new_tokens: int = 64) -> Choice:
        """Choose a plan, try it on the first traced prompt, and store the result.

        Raises: as `choose`.
        """
        traced = [prompt for prompt in self.prompts if self.store.has(prompt.key)]
        evidence = self.evidence()
        best = choose(evidence, self.shape, criterion)
        kv = mean(
            kv_bytes(self.shape, best.plan.cache_tokens(layout, self.shape.layers))
            / kv_bytes(self.shape, [len(layout)] * self.shape.layers)
            for layout in evidence.layouts
        )
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
        choice = replace(best, plan=replace(best.plan, origin=origin))
        shown_key = f"{traced[0].key}-{choice.plan.fingerprint}"
        self.store.save(shown_key, self._trace(traced[0], choice.plan))
        answers = [self._answer(traced[0], plan, max_new_tokens) for plan in (NONE, choice.plan)]
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
                "failures": [{"clip": str(one.prompt.clip), "reason": one.reason} for one in failures],
                "kv": kv,
                "answers": [answer.to_dict() for answer in answers],
            }
        )
        return choice

    def _pipe(self) -> Pipeline:
        if self._pipeline is None:
            self._pipeline = pipeline(self.model, NONE, device=self._device, dtype=self._dtype)
        return self._pipeline

    def _trace(self, prompt: Prompt, plan: Plan) -> Record:
        clip = Clip.open(prompt.clip)
        trace = self._pipe().engine.trace(Request(clip=clip, question=prompt.question), plan, alpha=self.alpha)
        return Record(clip=prompt.clip.name, question=prompt.question, trace=trace, preview=make_preview(clip, trace))

    def _answer(self, prompt: Prompt, plan: Plan, max_new_tokens: int) -> Any:
        return self._pipe()(prompt.clip, prompt.question, plan=plan, max_new_tokens=max_new_tokens)
