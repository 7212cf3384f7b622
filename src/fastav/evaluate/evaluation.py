"""The evaluation of a task under several plans: its samples and their rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any

from fastav.device import resolve_device
from fastav.errors import FastAVError, PlanError, TaskError
from fastav.evaluate.answers import Answered, Failure, Setup, Work, answers
from fastav.evaluate.rows import Row
from fastav.pipelines import resolve
from fastav.plan import Plan
from fastav.registry import ENGINES, unknown_name
from fastav.task import Sample, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A model, a task and plans that all answer the same samples.  Made by `of`; the model is loaded in `rows`.

    all_samples: all samples of the task, by id. samples: the chosen ones, with the families in turn.
    """

    setup: Setup
    task: Task
    all_samples: Mapping[str, Sample]
    samples: Sequence[Sample]
    limit: int | None

    @classmethod
    def of(
        cls,
        model: str,
        task: Task,
        plans: Mapping[str, Plan],
        *,
        families: Sequence[str] = (),
        limit: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        kl: bool = False,
    ) -> "Evaluation":
        """Choose the samples, and refuse what cannot be evaluated.

        model, device, dtype: as for `fastav.pipeline`. plans: by the name that their rows carry. families: empty for
        all. limit: the number of samples, taken from the families in turn. kl: whether to measure the divergence from
        the unpruned model too, which must be one of the plans. Raises: TaskError, UnknownName, PlanError,
        UnsupportedModel, UnsupportedPlan, CheckpointError, FastAVError.
        """
        if not plans:
            raise PlanError("there is no plan to evaluate")
        adapter, _, config = resolve(model)
        for plan in plans.values():
            ENGINES["transformers"].check(config, plan, adapter=adapter)
        run_device, precision = resolve_device(device, dtype)
        setup = Setup(model=model, device=str(run_device), dtype=precision, plans=dict(plans), kl=kl)
        if kl and setup.reference is None:
            raise PlanError("the KL divergence needs the unpruned model", "add none to the plans")
        all_samples = _by_id(task)
        return cls(
            setup=setup,
            task=task,
            all_samples=all_samples,
            samples=choose_samples(list(all_samples.values()), families, limit),
            limit=limit,
        )

    def head(self) -> dict[str, Any]:
        """The description of this run that precedes its rows in a file."""
        return {
            "task": self.task.name,
            **self.setup.head(),
            "families": list(dict.fromkeys(sample.family for sample in self.samples)),
            "limit": self.limit,
            "samples": len(self.samples),
        }

    def remaining(self, done: Sequence[Row]) -> list[Work]:
        """The samples that have no answer yet under some plans, with these plans; an error is no answer.

        If divergences are measured, an answer without one is missing too, and the unpruned answer comes first.
        """
        reference = self.setup.reference if self.setup.kl else None
        answered = {
            row.key
            for row in done
            if row.error is None and (reference is None or row.plan == reference or row.kl is not None)
        }
        pending = [
            (sample, tuple(plan for plan in self.setup.plans if (sample.id, plan) not in answered))
            for sample in self.samples
        ]
        return [
            (sample, plans if reference is None else tuple(dict.fromkeys((reference, *plans))))
            for sample, plans in pending
            if plans
        ]

    def rows(self, done: Sequence[Row] = (), *, jobs: int = 1, keep_going: bool = False) -> Iterator[Row]:
        """The missing rows, in order of completion.

        jobs: the number of processes; each loads the model, and they share the threads that torch would use.
        keep_going: a failure becomes a row with an error, instead of an exception. Raises: FastAVError if a sample
        fails; as `fastav.pipeline`.
        """
        for sample, plan, outcome in answers(self.setup, self.remaining(done), jobs):
            if isinstance(outcome, Failure) and not keep_going:
                raise FastAVError(
                    f"sample {sample.id!r} under plan {plan!r}: {outcome.reason}",
                    "--keep-going records such samples as errors and continues",
                )
            yield self._row(sample, plan, outcome)

    def metrics(self, rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float | int]]]:
        """The metrics that the task reports beyond mean scores, by plan and family (or `all`)."""
        metrics_by_plan = {}
        for plan in self.setup.plans:
            graded = [
                (sample, row.answer, self.task.grade(sample, row.answer))
                for row in rows
                if row.plan == plan and row.error is None and (sample := self.all_samples.get(row.sample))
            ]
            metrics_by_plan[plan] = {
                family: {name: value for name, value in values.items() if name not in _STATISTICS}
                for family, values in self.task.report(graded).items()
            }
        return metrics_by_plan

    def _row(self, sample: Sample, plan: str, outcome: Answered | Failure) -> Row:
        names: dict[str, Any] = {
            "task": self.task.name,
            "sample": sample.id,
            "family": sample.family,
            "plan": plan,
            "fingerprint": self.setup.plans[plan].fingerprint,
            "gold": sample.answer,
        }
        if isinstance(outcome, Failure):
            return Row(**names, error=outcome.reason)
        answer, grade = outcome.answer, self.task.grade(sample, outcome.answer.text)
        return Row(
            **names,
            answer=answer.text,
            score=grade.score,
            parsed=grade.parsed,
            prompt_tokens=dict(answer.prompt_tokens),
            flops={"full": answer.flops.full, "pruned": answer.flops.pruned},
            kv_bytes={"full": answer.kv_bytes.full, "pruned": answer.kv_bytes.pruned},
            seconds=dict(answer.seconds),
            new_tokens=len(answer.token_ids),
            retention=answer.mean_retention,
            kl=None if outcome.kl is None else {"mean": outcome.kl.mean, "max": outcome.kl.max},
        )


_STATISTICS = {"accuracy", "stderr", "n", "unparsed"}  # `fastav.evaluate.report` computes these for every task


def choose_samples(samples: Sequence[Sample], families: Sequence[str] = (), limit: int | None = None) -> list[Sample]:
    """Samples of these families (all if empty), the families in turn, at most `limit`.

    So the first samples represent all families, and a higher limit only adds samples.
    Raises: UnknownName.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.family, []).append(sample)
    for family in families:
        if family not in groups:
            raise unknown_name("family of samples", family, groups)
    by_turns = zip_longest(*(group for name, group in groups.items() if not families or name in families))
    return list(islice(filter(None, chain.from_iterable(by_turns)), limit))


def _by_id(task: Task) -> dict[str, Sample]:
    all_samples: dict[str, Sample] = {}
    for sample in task.samples():
        if sample.id in all_samples:
            raise TaskError(f"two samples of {task.name} have the id {sample.id!r}")
        if not sample.question.strip():
            raise TaskError(f"sample {sample.id!r} of {task.name}: the question is empty")
        all_samples[sample.id] = sample
    if not all_samples:
        raise TaskError(f"{task.name} has no samples", "is its folder the right one?")
    return all_samples
