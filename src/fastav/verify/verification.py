"""The verification of plans on a file of questions: its questions and their rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastav.device import resolve_device
from fastav.errors import FastAVError, PlanError
from fastav.evaluate.answers import Setup
from fastav.pipelines import Pipeline, resolve
from fastav.plan import Plan
from fastav.questions import Question, read_questions
from fastav.registry import ENGINES
from fastav.request import Request
from fastav.verify.measuring import Outcome, measure, one_line
from fastav.verify.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A model, a file of questions, and plans that are compared with the unpruned model.

    Made by `of`; the model is loaded in `rows`. fingerprint: of the questions.
    """

    setup: Setup
    questions: Sequence[Question]
    fingerprint: str
    max_new_tokens: int

    @classmethod
    def of(
        cls,
        model: str,
        questions: Path,
        plans: Mapping[str, Plan],
        *,
        use: str = "auto",
        max_new_tokens: int = 128,
        device: str | None = None,
        dtype: str | None = None,
    ) -> "Verification":
        """Read the questions, and refuse what cannot be verified.

        model, device, dtype: as for `fastav.pipeline`. questions: a file as `fastav batch` reads it. plans: by the name
        that their rows carry. use: the tracks of questions that name none. max_new_tokens: of every answer.
        Raises: PlanError, UnsupportedModel, UnsupportedPlan, CheckpointError, FastAVError.
        """
        if not plans:
            raise PlanError("there is no plan to verify")
        if max_new_tokens < 1:
            raise FastAVError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        all_questions = read_questions(questions, use)
        adapter, _, config = resolve(model)
        for plan in plans.values():
            ENGINES["transformers"].check(config, plan, adapter=adapter)
        run_device, precision = resolve_device(device, dtype)
        return cls(
            setup=Setup(model=model, device=str(run_device), dtype=precision, plans=dict(plans)),
            questions=all_questions,
            fingerprint=_fingerprint(all_questions, questions.parent),
            max_new_tokens=max_new_tokens,
        )

    def head(self) -> dict[str, Any]:
        """The description of this run that precedes its rows in a file."""
        return {
            **self.setup.head(),
            "questions": self.fingerprint,
            "n_questions": len(self.questions),
            "max_new_tokens": self.max_new_tokens,
        }

    def remaining(self, done: Sequence[Row]) -> list[Question]:
        """The questions without a complete row; a failure is no answer."""
        complete = {row.id for row in done if not row.failures}
        return [question for question in self.questions if question.id not in complete]

    def rows(self, done: Sequence[Row] = (), *, batch: int = 1, keep_going: bool = False) -> Iterator[Row]:
        """The missing rows, in the order of the file.

        batch: how many questions run together. keep_going: a failure becomes part of a row, instead of an exception.
        Raises: FastAVError if a question fails, or for a batch size below 1; as `fastav.pipeline`.
        """
        if batch < 1:
            raise FastAVError(f"batch must be at least 1, got {batch}")
        remaining = self.remaining(done)
        if not remaining:
            return
        with self.setup.load() as pipe:
            for start in range(0, len(remaining), batch):
                for row in self._batch_rows(pipe, remaining[start : start + batch]):
                    if row.failures and not keep_going:
                        plan, reason = row.failures[0]
                        raise FastAVError(
                            f"question {row.id!r} under plan {plan!r}: {reason}",
                            "--keep-going records such questions as errors and continues",
                        )
                    yield row

    def _batch_rows(self, pipe: Pipeline, questions: Sequence[Question]) -> Iterator[Row]:
        made = [question.request() for question in questions]
        requests = [request for request in made if isinstance(request, Request)]
        outcomes = iter(measure(pipe.engine, self.setup.plans, requests, self.max_new_tokens) if requests else ())
        for question, request in zip(questions, made, strict=True):
            yield _row(question, next(outcomes) if isinstance(request, Request) else request)


def _row(question: Question, outcome: Outcome | FastAVError) -> Row:
    names: dict[str, Any] = {
        "id": question.id,
        "clip": question.clip,
        "question": question.text,
        "use": question.use,
    }
    if isinstance(outcome, FastAVError):
        return Row(**names, error=one_line(outcome))
    unpruned, plans = outcome
    return Row(**names, unpruned=unpruned, plans=plans)


def _fingerprint(questions: Sequence[Question], folder: Path) -> str:
    """Twelve digits that identify the questions; clips count by their paths relative to the folder of the file."""
    entries = [
        (one.id, _relative(one.clip, folder), one.text, one.use)
        if one.messages is None
        else (one.id, json.dumps([one.messages, one.tools]).replace(str(folder), "."), one.use)
        for one in questions
    ]
    return sha256(json.dumps(entries).encode()).hexdigest()[:12]


def _relative(clip: str, folder: Path) -> str:
    path = Path(clip)
    return path.relative_to(folder).as_posix() if "://" not in clip and path.is_relative_to(folder) else clip
