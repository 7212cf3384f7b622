"""Spot checks: vLLM against the engine transformers, and prompts in chunks or found in the cache against whole ones."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_vllm.answers import LIKELY, PROMPTS, Answer, Job, Question
from benchmarks.load.server import run_to_end
from fastav.engines.vllm import server_args
from fastav.errors import FastAVError
from fastav.plan import Plan
from fastav.presets import NONE

UNPRUNED = "none"
BOUNDS: Mapping[str, float] = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}  # of log probabilities, by dtype
NEW = 8  # tokens of an answer
CHUNK = 192  # tokens of a step, in which no prompt fits
MAX_MODEL_LEN = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One answer against another to the same prompt under the same plan.

    check: what is compared. difference: the largest, of log probabilities, over `steps` steps; None if they cannot be
    compared, with the reason. apart: how far unpruned answers are from those of the plan, by the same measure; None
    for the unpruned ones. A plan that had no effect would differ by as much.
    """

    check: str
    dtype: str
    prompt: str
    plan: str
    steps: int = 0
    difference: float | None = None
    bound: float
    apart: float | None = None
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the answers agree, and more than a plan without effect would."""
        if self.difference is None or self.difference > self.bound:
            return False
        return self.apart is None or self.difference < self.apart

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON holds it."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        """A line for a terminal."""
        found = self.reason if self.difference is None else f"{self.difference:.2g} over {self.steps} steps"
        apart = "" if self.apart is None else f", unpruned answers are {self.apart:.2g} away"
        mark = "ok    " if self.passed else "WRONG "
        what = f"{self.check}, {self.dtype}, {self.plan}, {self.prompt}"
        return f"  {mark}{what}: {found} (at most {self.bound:g}{apart})"


def compare(answer: Answer, other: Answer, bound: float | int) -> tuple[int, float | None, str]:
    """The steps compared, the largest difference of log probabilities, and a reason if there is none.

    Steps are compared as long as both have the same tokens. Where they first differ, both tokens must be as likely, up
    to twice the bound. An answer with the probabilities of all tokens, along the other's, is compared to its end.
    """
    if answer.length != other.length:
        return 0, None, f"the prompt has {answer.length} tokens, and {other.length}"
    largest = 0.0
    for step, (own, others) in enumerate(zip(answer.logprobs, other.logprobs, strict=True)):
        if not (both := own.keys() & others.keys()):
            return step, None, f"step {step} has no likely token in common"
        largest = max([largest, *(abs(own[token] - others[token]) for token in both)])
        if answer.tokens[step] == other.tokens[step]:
            continue
        pair = answer.tokens[step], other.tokens[step]
        gaps = [abs(step_of[pair[0]] - step_of[pair[1]]) for step_of in (own, others) if both.issuperset(pair)]
        if not gaps or max(gaps) > 2 * bound:
            return step, None, f"step {step} chose token {pair[0]}, and {pair[1]}, which are not as likely"
        if len(others) <= LIKELY + 1:  # the answers go on differently
            return step + 1, largest, ""
    return len(answer.tokens), largest, ""


def _one_by_one(*plans: str) -> list[list[Question]]:
    """Every prompt under every plan, in a batch of its own."""
    return [[Question(prompt=prompt, plan=plan)] for plan in plans for prompt in PROMPTS]


@dataclass(kw_only=True)
class SpotChecks:
    """All checks, in order.

    small, large: folders of a small model and of the one that is served. dtypes: of their weights in vLLM. plans: the
    contenders' plans by name; `early` lists those that cut before the first layer, of which prefix caching reuses
    nothing. end: a time of `time.monotonic`.
    """

    small: Path
    large: Path
    dtypes: tuple[str, str]
    plans: Mapping[str, Plan]
    early: Sequence[str]
    device: str
    folder: Path
    end: float | int
    output: Callable[[str], Any]
    comparisons: list[Comparison] = field(default_factory=list)
    _small: list[Answer] = field(default_factory=list)  # to whole prompts

    def run(self) -> bool:
        """Whether all passed.  Raises: FastAVError if an engine fails, or if there is no time."""
        self._against_transformers()
        if self._all_passed():
            self._in_pieces(self._whole())
        return self._all_passed()

    def _all_passed(self) -> bool:
        return all(one.passed for one in self.comparisons)

    def _against_transformers(self) -> None:
        """vLLM on the small model, against the engine transformers in float32 along vLLM's answers."""
        dtype, bound = self.dtypes[0], BOUNDS[self.dtypes[0]]
        answers = self._whole_prompts("vllm", self.small, dtype)
        forced = [Question(prompt=one.prompt, plan=one.plan, tokens=one.tokens) for one in answers]
        references = self._answers("transformers", self.small, None, [forced])
        for answer, reference in zip(answers, references, strict=True):
            self._add("vLLM and transformers", dtype, answer, reference, references, bound)

        self._small = answers

    def _whole_prompts(self, name: str, source: Path, dtype: str) -> list[Answer]:
        """vLLM's answers to whole prompts, which are asked one by one and together."""
        alone = _one_by_one(UNPRUNED, *self.plans)
        together = [question for batch in alone for question in batch]
        settings = self._settings(dtype, next(iter(self.plans)), eager=True)
        answers = self._answers(name, source, settings, [*alone, together])
        whole = answers[: len(alone)]
        for answer, other in zip(answers[len(alone) :], whole, strict=True):
            self._add("together and alone", dtype, answer, other, whole, BOUNDS[dtype])
        return whole

    def _whole(self) -> list[Answer]:
        """The large model's answers to whole prompts."""
        if (self.small, self.dtypes[0]) == (self.large, self.dtypes[1]):
            return self._small
        return self._whole_prompts("whole", self.large, self.dtypes[1])

    def _in_pieces(self, whole: Sequence[Answer]) -> None:
        """vLLM on the large model: prompts in chunks, and found in the prefix cache."""
        dtype, (first, *others) = self.dtypes[1], self.plans
        # compiled with the first plan only, as compiling takes most of a start
        self._chunks(dtype, first, _one_by_one(UNPRUNED, first), whole, eager=False)
        for plan in others:
            self._chunks(dtype, plan, _one_by_one(plan), whole, eager=True)

    def _chunks(
        self, dtype: str, plan: str, pieces: Sequence[Sequence[Question]], whole: Sequence[Answer], *, eager: bool
    ) -> None:
        """Ask for each prompt in chunks, and again, when its beginning is in the prefix cache."""
        if not self._all_passed():
            return
        settings = self._settings(dtype, plan, eager=eager) | {
            "max_num_batched_tokens": CHUNK,
            "enable_chunked_prefill": True,
            "enable_prefix_caching": True,
        }
        answers = self._answers(
            f"chunks-{plan}", self.large, settings, [*pieces, *([] if plan in self.early else pieces)]
        )
        expected = {(one.prompt, one.plan): one for one in whole}
        bound = BOUNDS[dtype]
        for place, answer in enumerate(answers):
            again = place >= len(pieces)
            check = "prefix cache and whole prompt" if again else "chunks and whole prompt"
            if bool(answer.cached) == again:
                self._add(check, dtype, answer, expected[answer.prompt, answer.plan], whole, bound)
            else:
                reason = f"{answer.cached} tokens were in the prefix cache"
                same = {"prompt": answer.prompt, "plan": answer.plan, "bound": bound}
                self._note(Comparison(check=check, dtype=dtype, reason=reason, **same))

    def _add(
        self, check: str, dtype: str, answer: Answer, other: Answer, others: Sequence[Answer], bound: float | int
    ) -> None:
        """Compare an answer with another.  others: where the unpruned answer to the same prompt is."""
        steps, difference, reason = compare(answer, other, bound)
        apart = None
        if answer.plan != UNPRUNED:
            (unpruned,) = (one for one in others if (one.prompt, one.plan) == (answer.prompt, UNPRUNED))
            first, pruned = unpruned.logprobs[0], other.logprobs[0]
            apart = max((abs(first[token] - pruned[token]) for token in first.keys() & pruned.keys()), default=None)
        self._note(
            Comparison(
                check=check,
                dtype=dtype,
                prompt=answer.prompt,
                plan=answer.plan,
                steps=steps,
                difference=difference,
                bound=bound,
                apart=apart,
                reason=reason,
            )
        )

    def _note(self, comparison: Comparison) -> None:
        self.comparisons.append(comparison)
        self.output(f"{comparison}")

    def _settings(self, dtype: str, plan: str, *, eager: bool) -> dict[str, Any]:
        """Arguments of `vllm.LLM` for whole prompts."""
        return {
            "dtype": dtype,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": 4 * MAX_MODEL_LEN,
            "enable_chunked_prefill": False,
            "enable_prefix_caching": False,
            "enforce_eager": eager or self.device == "cpu",  # compiling takes minutes on a CPU
            "max_num_seqs": 16,
            "max_logprobs": LIKELY,
            "kv_cache_memory_bytes": 2 << 30 if self.device == "cuda" else 256 << 20,
            "skip_mm_profiling": True,
            "limit_mm_per_prompt": {"image": 0, "video": 1, "audio": 1},
            "additional_config": {"fastav": {"plan": json.loads(self.plans[plan].to_json()), "requests": "any"}},
        }

    def _answers(
        self, name: str, source: Path, settings: Mapping[str, Any] | None, batches: Sequence[Sequence[Question]]
    ) -> list[Answer]:
        """The answers of an engine in a process of its own.  Raises: FastAVError."""
        plans = {UNPRUNED: NONE.to_json()} | {name: plan.to_json() for name, plan in self.plans.items()}
        job = Job(source=str(source), settings=settings, plans=plans, batches=batches, new=NEW, device=self.device)
        given, out, log = (self.folder / f"{name}.{end}" for end in ("job.json", "out.json", "log"))
        given.write_text(json.dumps(asdict(job)))
        start = time.monotonic()
        if start >= self.end:
            raise FastAVError("there is no time left for the spot checks", "--minutes")
        self.output(f"{name}: asking {sum(map(len, batches))} questions, {source.name}")
        words = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_vllm.answers", str(given), str(out)]
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if server_args.has_cpu_build():
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        run_to_end(f"the engine {name}", words, environment, log, seconds=self.end - start)
        return [Answer.parse(entry) for entry in json.loads(out.read_text())]
