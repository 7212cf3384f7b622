"""The same questions, to vLLM and to the transformers engine, with the logits of every generated token."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastav.engines.transformers import prune
from fastav.plan import Plan
from fastav.registry import MODELS

RUNNER = "V2" if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else "V1"  # that these tests are for
RATE, FPS = 16_000, 2.0
LIKELY = 8  # tokens of which each step's probability is compared
positions: dict[tuple[int, ...], tuple[torch.Tensor, int]] = {}  # that vLLM gave each prompt
TOLERANCE = 1e-3  # of their logarithms
AUDIO = "<|audio_bos|><|AUDIO|><|audio_eos|>"
IMAGE = "<|vision_bos|><|IMAGE|><|vision_eos|>"
VIDEO = "<|vision_bos|><|VIDEO|><|vision_eos|>"


@dataclass(frozen=True, kw_only=True)
class Question:
    """text: with the model's placeholders for media. together: whether the sound is the video's own. new: tokens."""

    text: str
    video: np.ndarray | None = None
    image: np.ndarray | None = None
    audio: np.ndarray | None = None
    together: bool = False
    new: int = 6
    more_images: tuple[np.ndarray, ...] = ()
    more_audio: tuple[np.ndarray, ...] = ()

    @property
    def video_metadata(self) -> dict[str, Any]:
        """Metadata of the video, as processors take them."""
        assert self.video is not None
        frames = len(self.video)
        return {"fps": FPS, "duration": frames / FPS, "total_num_frames": frames, "frames_indices": list(range(frames))}

    def for_vllm(self) -> dict[str, Any]:
        media: dict[str, Any] = {}
        if self.video is not None:
            media["video"] = (self.video, self.video_metadata | {"video_backend": "opencv", "do_sample_frames": False})
        if self.image is not None:
            media["image"] = [Image.fromarray(one) for one in (self.image, *self.more_images)]
        if self.audio is not None:
            media["audio"] = [(one, RATE) for one in (self.audio, *self.more_audio)]
        prompt: dict[str, Any] = {"prompt": self.text}
        prompt |= {"multi_modal_data": media} if media else {}
        # vLLM does not read the rate off the video, and Qwen3-Omni orders the tokens of both by it
        return prompt | ({"mm_processor_kwargs": {"use_audio_in_video": True, "fps": FPS}} if self.together else {})

    def for_processor(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"text": [self.text], "return_tensors": "pt"}
        if self.video is not None:
            frames = torch.from_numpy(self.video).permute(0, 3, 1, 2)
            arguments |= {"videos": [frames], "video_metadata": [self.video_metadata], "do_sample_frames": False}
        if self.image is not None:
            arguments |= {"images": [Image.fromarray(one) for one in (self.image, *self.more_images)]}
        if self.audio is not None:
            arguments |= {"audio": [self.audio, *self.more_audio]}
        return arguments | ({"use_audio_in_video": True} if self.together else {})


def film(seconds: float, seed: int, side: int = 112) -> np.ndarray:
    make = np.random.default_rng(seed)
    return make.integers(0, 255, (int(seconds * FPS), side, side, 3), dtype=np.uint8)


def sound(seconds: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * 0.1).astype(np.float32)


def questions(audio: str, video: str, image: str) -> list[Question]:
    """Questions of all kinds, with the placeholders of a model that takes sound."""
    return [
        Question(text=f"hear {audio} and see {video} what is it?", video=film(4, 1), audio=sound(3, 2), new=9),
        Question(text="only text, of some length, about nothing at all that one could see", new=17),
        Question(text=f"x {audio} tell", audio=sound(2, 3), new=12),
        Question(text=f"a film {video} what does it show, and for how long?", video=film(6, 4)),
        Question(text=f"with its own sound {video} what is it?", video=film(4, 5), audio=sound(4, 6), together=True),
        Question(text="hi", new=5),
        Question(text=f"{video}", video=film(2, 7), new=3),
        Question(text=f"of {image} and {audio} what do you make?", image=film(0.5, 8)[0], audio=sound(2, 9)),
    ]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """prompt_len: tokens of the prompt. tokens: of the answer. logprobs: for each, those of the likeliest ids."""

    prompt_len: int
    tokens: list[int]
    logprobs: list[dict[int, float]]


@dataclass
class Reference:
    """A checkpoint, and the answers of the transformers engine."""

    name: str
    folder: Path
    model: Any = field(init=False)
    processor: Any = field(init=False)
    cache: dict[Any, tuple[int, list[int], torch.Tensor]] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.adapter = MODELS[self.name]()
        self.model, self.processor = self.adapter.load(str(self.folder), dtype=torch.float32)

    def __call__(self, question: Question, plan: Plan) -> tuple[int, list[int], torch.Tensor]:
        """The prompt's length, greedy tokens, and the logarithm of every token's probability at each of them.

        Pruned or not, vLLM and transformers give some videos other positions (text after a video of Qwen2.5-VL, the
        placeholders of a video with its own sound): there vLLM's are used.
        """
        key = (id(question), plan.fingerprint)
        self.questions.append(question)  # so that no other gets its id
        if key not in self.cache:
            rate = {"fps": FPS} if self.adapter.supports_audio and question.video is not None else {}
            inputs = dict(self.processor(**question.for_processor(), **rate))
            inputs |= {"use_audio_in_video": True} if question.together else {}
            ids, layouts = tuple(inputs["input_ids"][0].tolist()), self.adapter.layouts(self.model.config, inputs)
            same_positions = (
                self._with_positions(*positions[ids])
                if question.video is not None or question.image is not None
                else nullcontext()
            )
            with same_positions, prune(self.model, plan, layouts=layouts, adapter=self.adapter), torch.inference_mode():
                out = self.model.generate(
                    **inputs,
                    max_new_tokens=question.new,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            length = inputs["input_ids"].shape[1]
            logprobs = torch.cat(out.logits).log_softmax(-1)
            self.cache[key] = length, out.sequences[0, length:].tolist(), logprobs
        return self.cache[key]

    @contextmanager
    def _with_positions(self, place: torch.Tensor, delta: int) -> Iterator[None]:
        """Make the model use these positions for its prompt."""
        owner = self.model if hasattr(self.model, "get_rope_index") else self.model.model
        owner.get_rope_index = lambda *_, **__: (place[:, None], torch.tensor([[delta]]))
        try:
            yield
        finally:
            del owner.get_rope_index


def plan_of(plan: Plan | str, reference: Reference) -> Plan:
    from fastav.adapter import plan_named

    return plan_named(plan, reference.adapter)


def settings(plan: Plan | str | None, **options: Any) -> dict[str, Any]:
    """Of an `LLM` for these tests."""
    spec = plan if isinstance(plan, str) or plan is None else json.loads(plan.to_json())
    entry = None if spec is None else {"plan": spec, "requests": "any"}
    arguments: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 64 << 20,
        "max_logprobs": LIKELY,
        "skip_mm_profiling": True,
        "additional_config": {} if entry is None else {"fastav": entry},
    }
    return arguments | options


class Engines:
    """vLLM's engines in this process, which take seconds to start: tests with the same settings share one.

    limit: how many there are at once.
    """

    def __init__(self, limit: int = 3) -> None:
        self._open: dict[str, Any] = {}
        self._limit = limit
        self._groups: tuple[int, bool] | None = None

    def __call__(self, folder: Path, plan: Plan | str | None, **options: Any) -> Any:
        """The engine of a checkpoint that was started with a plan and options, idle."""
        arguments = settings(plan, **options)
        key = json.dumps([str(folder), arguments], sort_keys=True)
        llm = self._open.pop(key, None)
        if llm is not None and llm.llm_engine.has_unfinished_requests():  # which a test left that failed
            _shut(llm)
            llm = None
        if llm is None:
            llm = self._start(folder, arguments)
        self._open[key] = llm
        return llm

    @contextmanager
    def own(self, folder: Path, plan: Plan | str | None, **options: Any) -> Iterator[Any]:
        """An engine for one test, which looks at its start or leaves it changed."""
        llm = self._start(folder, settings(plan, **options))
        try:
            yield llm
        finally:
            _shut(llm)

    def _start(self, folder: Path, arguments: dict[str, Any]) -> Any:
        from vllm import LLM

        # a process has one set of groups of ranks, for its first model: with experts or without
        groups = arguments.get("tensor_parallel_size", 1), "num_experts" in (folder / "config.json").read_text()
        if groups != self._groups:
            self.close()
            self._groups = groups
        while len(self._open) >= self._limit:
            _shut(self._open.pop(next(iter(self._open))))
        llm = LLM(str(folder), **arguments)
        assert set(llm.collective_rpc(runner_of)) == {RUNNER}
        record_positions(llm)
        return llm

    def close(self) -> None:
        """End all of them, as if they had not been there."""
        from vllm.distributed import cleanup_dist_env_and_memory

        while self._open:
            _shut(self._open.popitem()[1])
        cleanup_dist_env_and_memory()


def _shut(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


def runner_of(worker: Any) -> str:
    """The model runner of a worker: V1 or V2."""
    modules = {base.__module__ for base in type(worker.model_runner).__mro__}
    (runner,) = {"vllm.v1.worker.gpu_model_runner": "V1", "vllm.v1.worker.gpu.model_runner": "V2"}.keys() & modules
    return "V2" if ".gpu." in runner else "V1"


def record_positions(llm: Any) -> None:
    """From now on, record the positions that vLLM gives to prompts."""
    llm.collective_rpc(_record)


def _record(worker: Any) -> None:
    model = worker.model_runner.get_model()
    if place := getattr(model, "get_mrope_input_positions", None):

        def recorded(ids: list[int], *rest: Any, **named: Any) -> Any:
            positions[tuple(ids)] = place(ids, *rest, **named)
            return positions[tuple(ids)]

        model.get_mrope_input_positions = recorded


def _recorded(_: Any) -> dict[tuple[int, ...], tuple[torch.Tensor, int]]:
    """The positions that a worker recorded, which may be another process."""
    return positions


def recorded_positions(llm: Any) -> None:
    """Take over the positions that a worker recorded."""
    positions.update(llm.collective_rpc(_recorded)[0])


def sampling(new: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": new, "ignore_eos": True, "logprobs": LIKELY} | options)


def generated(output: Any) -> Generated:
    """The answer in an output of vLLM."""
    (answer,) = output.outputs
    logprobs = [{token: one.logprob for token, one in step.items()} for step in answer.logprobs]
    return Generated(prompt_len=len(output.prompt_token_ids), tokens=list(answer.token_ids), logprobs=logprobs)


def ask(llm: Any, questions: list[Question], plan: Plan | str | None = None) -> list[Generated]:
    """The answers to questions sent at the same time.  plan: of the requests; None: the engine's."""
    extra_args = {} if plan is None else {"fastav": plan if isinstance(plan, str) else plan.to_json()}
    prompts, params = [q.for_vllm() for q in questions], [sampling(q.new, extra_args=extra_args) for q in questions]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    recorded_positions(llm)
    return [generated(output) for output in outputs]


def difference(answer: Generated, expected: tuple[int, list[int], torch.Tensor]) -> float:
    """The largest difference between logarithms of probabilities; first of all the tokens are the same."""
    prompt_len, tokens, logprobs = expected
    assert answer.prompt_len == prompt_len
    assert answer.tokens == tokens
    assert all(len(step) >= LIKELY for step in answer.logprobs)
    return max(
        abs(value - float(logprobs[at, token]))
        for at, step in enumerate(answer.logprobs)
        for token, value in step.items()
    )


def agree(llm: Any, reference: Reference, plan: Plan | str | None, questions: list[Question]) -> None:
    """The answers by a plan are the transformers engine's; requests name the plan if it is not the engine's."""
    chosen = plan_of("none" if plan is None else plan, reference)
    entry = (llm.llm_engine.vllm_config.additional_config or {}).get("fastav")
    own = entry is None or Plan.from_json(json.dumps(entry["plan"])) == chosen
    assert plan is None or entry is not None
    answers = ask(llm, questions, None if own else plan)
    differences = [difference(answer, reference(q, chosen)) for answer, q in zip(answers, questions, strict=True)]
    assert max(differences) < TOLERANCE
