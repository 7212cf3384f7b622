"""Greedy answers with the log probabilities of their tokens: `python -m benchmarks.gpu_vllm.answers JOB.json OUT.json`.

An engine runs in a process of its own, so that none of its memory is left for the next. A job is the JSON of a `Job`;
what is written is a list of `Answer`, in the order of the job's questions.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

import fastav
from benchmarks.load.questions import Kind, encode
from fastav.engines.vllm import compat
from fastav.pipelines import resolve
from fastav.plan import Plan
from fastav.request import Request

LIKELY = 20  # tokens of each step whose probability vLLM gives
SEEN = Kind(name="silent clip of 3 s", seconds=3, video=True)
HEARD = Kind(name="sound of 4 s", seconds=4, audio=True)
PROMPTS: Mapping[str, Sequence[Kind]] = {  # a video's own sound has other positions in vLLM than in transformers
    "clip and sound": (SEEN, HEARD),
    "silent clip": (
        Kind(name="silent clip of 4 s", seconds=4, video=True),
    ),  # another: it would be in the prefix cache
    "sound": (Kind(name="sound of 12 s", seconds=12, audio=True),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt under a plan.  tokens: an answer to it, along which the engine transformers gives its probabilities."""

    prompt: str
    plan: str
    tokens: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What an engine is asked.

    source: folder of the model. settings: arguments of `vllm.LLM`; None for the engine transformers, in float32.
    plans: by name, as JSON. batches: questions that are asked at the same time, batch after batch. new: tokens of an
    answer. device: of the engine transformers.
    """

    source: str
    settings: Mapping[str, Any] | None
    plans: Mapping[str, str]
    batches: Sequence[Sequence[Question]]
    new: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer.

    length: tokens of the prompt. cached: of them, those that were in the prefix cache. logprobs: at each step, of the
    likeliest tokens, or of all.
    """

    prompt: str
    plan: str
    length: int
    cached: int
    tokens: Sequence[int]
    logprobs: Sequence[Mapping[int, float]]

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> "Answer":
        """The answer in JSON, whose keys are text."""
        steps = [{int(token): value for token, value in step.items()} for step in entry["logprobs"]]
        return cls(**{**entry, "logprobs": steps})


def request(prompt: str) -> Request:
    """The prompt as every engine gets it."""
    media = [{"type": "video" if kind.video else "audio", "path": encode(kind)} for kind in PROMPTS[prompt]]
    content = [*media, {"type": "text", "text": f"{prompt}: what happens here, what is heard, and when does it end?"}]
    return Request(messages=[{"role": "user", "content": content}])


def vllm_answers(job: Job) -> list[Answer]:
    """vLLM's answers."""
    adapter, _, _ = resolve(job.source)
    processor: Any = AutoProcessor.from_pretrained(job.source)
    inputs = {name: adapter.vllm_inputs(processor, request(name)) for name in PROMPTS}
    prompts = {
        name: {
            "prompt": one.text,
            "multi_modal_data": dict(one.media),
            "mm_processor_kwargs": dict(one.options),
        }
        for name, one in inputs.items()
    }
    llm: Any = compat.LLM(job.source, **(job.settings or {}))
    answers = []
    for batch in job.batches:
        params = [
            compat.SamplingParams(
                temperature=0,
                max_tokens=job.new,
                ignore_eos=True,
                logprobs=LIKELY,
                extra_args={"fastav": job.plans[question.plan]},
            )
            for question in batch
        ]
        outputs = llm.generate([prompts[question.prompt] for question in batch], params, use_tqdm=False)
        answers += map(_answer, batch, outputs)
    return answers


def _answer(question: Question, output: Any) -> Answer:
    (one,) = output.outputs
    return Answer(
        prompt=question.prompt,
        plan=question.plan,
        length=len(output.prompt_token_ids),
        cached=output.num_cached_tokens or 0,
        tokens=list(one.token_ids),
        logprobs=[{token: entry.logprob for token, entry in step.items()} for step in one.logprobs],
    )


def reference_answers(job: Job) -> list[Answer]:
    """Log probabilities of all tokens by the engine transformers, in float32, along given answers."""
    processor: Any = AutoProcessor.from_pretrained(job.source)
    answers = []
    with fastav.pipeline(job.source, plan="none", dtype="float32", device=job.device) as pipe:
        for question in (question for batch in job.batches for question in batch):
            asked = request(question.prompt)
            length = len(pipe.adapter.prepare(processor, [asked]).layouts[0])
            plan = Plan.from_json(job.plans[question.plan])
            (logits,) = pipe.engine.forced_logits([asked], plan, [list(question.tokens[:-1])])
            steps = [dict(enumerate(row)) for row in logits.float().log_softmax(-1).tolist()]
            answer = Answer(
                prompt=question.prompt,
                plan=question.plan,
                length=length,
                cached=0,
                tokens=[max(step, key=step.__getitem__) for step in steps],
                logprobs=steps,
            )
            answers.append(answer)
    return answers


def main(arguments: Sequence[str]) -> None:
    """Read a job, and write its answers."""
    source, out = map(Path, arguments)
    entry = json.loads(source.read_text())
    entry["batches"] = [[Question(**question) for question in batch] for batch in entry["batches"]]
    job = Job(**entry)
    answers = reference_answers(job) if job.settings is None else vllm_answers(job)
    out.write_text(json.dumps([asdict(answer) for answer in answers]))


if __name__ == "__main__":
    main(sys.argv[1:])
