"""The same questions, to vLLM and to the transformers engine, with the logits of every generated token."""

import json
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

RATE, FPS = 16_000, 2.0
LIKELY = 8  # tokens of which each step's probability is compared
positions: dict[tuple[int, ...], tuple[torch.Tensor, int]] = {}  # of every prompt, as vLLM placed it
TOLERANCE = 1e-3  # of their logarithms
HEARD = "<|audio_bos|><|AUDIO|><|audio_eos|>"
DRAWN = "<|vision_bos|><|IMAGE|><|vision_eos|>"
SEEN = "<|vision_bos|><|VIDEO|><|vision_eos|>"


@dataclass(frozen=True, kw_only=True)
class Question:
    """text, with the model's marks where media are. together: whether the sound is the video's own."""

    text: str
    video: np.ndarray | None = None
    image: np.ndarray | None = None
    audio: np.ndarray | None = None
    together: bool = False
    new: int = 6

    @property
    def told(self) -> dict[str, Any]:
        """What is said of the video."""
        assert self.video is not None
        frames = len(self.video)
        return {"fps": FPS, "duration": frames / FPS, "total_num_frames": frames, "frames_indices": list(range(frames))}

    def for_vllm(self) -> dict[str, Any]:
        media: dict[str, Any] = {}
        if self.video is not None:
            media["video"] = (self.video, self.told | {"video_backend": "opencv", "do_sample_frames": False})
        if self.image is not None:
            media["image"] = Image.fromarray(self.image)
        if self.audio is not None:
            media["audio"] = (self.audio, RATE)
        asked: dict[str, Any] = {"prompt": self.text}
        asked |= {"multi_modal_data": media} if media else {}
        # vLLM does not read the rate off the video, and Qwen3-Omni orders the tokens of both by it
        return asked | ({"mm_processor_kwargs": {"use_audio_in_video": True, "fps": FPS}} if self.together else {})

    def for_processor(self) -> dict[str, Any]:
        given: dict[str, Any] = {"text": [self.text], "return_tensors": "pt"}
        if self.video is not None:
            frames = torch.from_numpy(self.video).permute(0, 3, 1, 2)
            given |= {"videos": [frames], "video_metadata": [self.told], "do_sample_frames": False}
        if self.image is not None:
            given |= {"images": [Image.fromarray(self.image)]}
        if self.audio is not None:
            given |= {"audio": [self.audio]}
        return given | ({"use_audio_in_video": True} if self.together else {})


def film(seconds: float, seed: int, side: int = 112) -> np.ndarray:
    make = np.random.default_rng(seed)
    return make.integers(0, 255, (int(seconds * FPS), side, side, 3), dtype=np.uint8)


def sound(seconds: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * 0.1).astype(np.float32)


def questions(heard: str, seen: str, drawn: str) -> list[Question]:
    """Of all kinds, with the marks of a model that hears and sees."""
    return [
        Question(text=f"hear {heard} and see {seen} what is it?", video=film(4, 1), audio=sound(3, 2), new=9),
        Question(text="only text, of some length, about nothing at all that one could see", new=17),
        Question(text=f"x {heard} tell", audio=sound(2, 3), new=12),
        Question(text=f"a film {seen} what does it show, and for how long?", video=film(6, 4)),
        Question(text=f"with its own sound {seen} what is it?", video=film(4, 5), audio=sound(4, 6), together=True),
        Question(text="hi", new=5),
        Question(text=f"{seen}", video=film(2, 7), new=3),
        Question(text=f"of {drawn} and {heard} what do you make?", image=film(0.5, 8)[0], audio=sound(2, 9)),
    ]


@dataclass(frozen=True, kw_only=True)
class Said:
    """prompt: how many tokens it has. tokens: generated. likely: of each, the logarithm of its probability, by id."""

    prompt: int
    tokens: list[int]
    likely: list[dict[int, float]]


@dataclass
class Reference:
    """A checkpoint, and what the transformers engine says of it."""

    name: str
    folder: Path
    model: Any = field(init=False)
    processor: Any = field(init=False)
    known: dict[Any, tuple[int, list[int], torch.Tensor]] = field(default_factory=dict)

    asked: list[Question] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.adapter = MODELS[self.name]()
        self.model, self.processor = self.adapter.load(str(self.folder), dtype=torch.float32)

    def __call__(self, question: Question, plan: Plan) -> tuple[int, list[int], torch.Tensor]:
        """The prompt's length, greedy tokens, and the logarithm of every token's probability at each of them.

        Pruned or not, vLLM and transformers place some videos differently (text after a video of Qwen2.5-VL, the marks
        of a video with its own sound): there vLLM's positions are taken.
        """
        key = (id(question), plan.fingerprint)
        self.asked.append(question)  # so that its id stays its own
        if key not in self.known:
            rate = {"fps": FPS} if self.adapter.hears and question.video is not None else {}
            inputs = dict(self.processor(**question.for_processor(), **rate))
            inputs |= {"use_audio_in_video": True} if question.together else {}
            ids, layouts = tuple(inputs["input_ids"][0].tolist()), self.adapter.layouts(self.model.config, inputs)
            placed = (
                self._placed(*positions[ids])
                if question.video is not None or question.image is not None
                else nullcontext()
            )
            with placed, prune(self.model, plan, layouts=layouts, adapter=self.adapter), torch.inference_mode():
                out = self.model.generate(
                    **inputs,
                    max_new_tokens=question.new,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            length = inputs["input_ids"].shape[1]
            likely = torch.cat(out.logits).log_softmax(-1)
            self.known[key] = length, out.sequences[0, length:].tolist(), likely
        return self.known[key]

    @contextmanager
    def _placed(self, place: torch.Tensor, delta: int) -> Iterator[None]:
        """While active, the model takes these positions of its prompt."""
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
    said = {"plan": plan if isinstance(plan, str) else json.loads(plan.to_json())} if plan is not None else None
    made: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 64 << 20,
        "max_logprobs": LIKELY,
        "skip_mm_profiling": True,
        "additional_config": {} if said is None else {"fastav": said},
    }
    return made | options


class Engines:
    """vLLM's engines in this process, which takes them seconds to start: the same one for all who ask for the same.

    limit: how many there are at once.
    """

    def __init__(self, limit: int = 3) -> None:
        self._open: dict[str, Any] = {}
        self._limit = limit
        self._ranks = 1

    def __call__(self, folder: Path, plan: Plan | str | None, **options: Any) -> Any:
        """The engine of a checkpoint that was started with a plan and options, idle."""
        made = settings(plan, **options)
        key = json.dumps([str(folder), made], sort_keys=True)
        llm = self._open.pop(key, None)
        if llm is not None and llm.llm_engine.has_unfinished_requests():  # which a test left that failed
            _shut(llm)
            llm = None
        if llm is None:
            llm = self._started(folder, made)
        self._open[key] = llm
        return llm

    @contextmanager
    def own(self, folder: Path, plan: Plan | str | None, **options: Any) -> Iterator[Any]:
        """An engine for one test, whose start is looked at or which it leaves changed."""
        llm = self._started(folder, settings(plan, **options))
        try:
            yield llm
        finally:
            _shut(llm)

    def _started(self, folder: Path, made: dict[str, Any]) -> Any:
        from vllm import LLM

        if (ranks := made.get("tensor_parallel_size", 1)) != self._ranks:
            self.close()  # a process is one rank of so many
            self._ranks = ranks
        while len(self._open) >= self._limit:
            _shut(self._open.pop(next(iter(self._open))))
        llm = LLM(str(folder), **made)
        note_positions(llm)
        return llm

    def close(self) -> None:
        """End all of them, as if they had not been there."""
        from vllm.distributed import cleanup_dist_env_and_memory

        while self._open:
            _shut(self._open.popitem()[1])
        cleanup_dist_env_and_memory()


def _shut(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


def note_positions(llm: Any) -> None:
    """From now on, remember how vLLM places its prompts."""
    llm.collective_rpc(_note)


def _note(worker: Any) -> None:
    model = worker.model_runner.get_model()
    if place := getattr(model, "get_mrope_input_positions", None):

        def noted(ids: list[int], *rest: Any, **named: Any) -> Any:
            positions[tuple(ids)] = place(ids, *rest, **named)
            return positions[tuple(ids)]

        model.get_mrope_input_positions = noted


def _noted(_: Any) -> dict[tuple[int, ...], tuple[torch.Tensor, int]]:
    """What a worker remembers, which may be a process of its own."""
    return positions


def sampling(new: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": new, "ignore_eos": True, "logprobs": LIKELY} | options)


def said(output: Any) -> Said:
    """What vLLM answered."""
    (answer,) = output.outputs
    likely = [{token: one.logprob for token, one in step.items()} for step in answer.logprobs]
    return Said(prompt=len(output.prompt_token_ids), tokens=list(answer.token_ids), likely=likely)


def ask(llm: Any, questions: list[Question], plan: Plan | str | None = None) -> list[Said]:
    """The answers to questions that are asked at once.  plan: that the requests name; None: the engine's."""
    named = {} if plan is None else {"fastav": plan if isinstance(plan, str) else plan.to_json()}
    prompts, params = [q.for_vllm() for q in questions], [sampling(q.new, extra_args=named) for q in questions]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    positions.update(llm.collective_rpc(_noted)[0])
    return [said(output) for output in outputs]


def difference(answer: Said, expected: tuple[int, list[int], torch.Tensor]) -> float:
    """The largest difference between logarithms of probabilities; first of all the tokens are the same."""
    prompt, tokens, likely = expected
    assert answer.prompt == prompt
    assert answer.tokens == tokens
    assert all(len(step) >= LIKELY for step in answer.likely)
    return max(
        abs(value - float(likely[at, token])) for at, step in enumerate(answer.likely) for token, value in step.items()
    )


def agree(llm: Any, reference: Reference, plan: Plan | str | None, questions: list[Question]) -> None:
    """Asked all at once, the answers by a plan are the transformers engine's; it is named if it is not the engine's."""
    chosen = plan_of("none" if plan is None else plan, reference)
    told = (llm.llm_engine.vllm_config.additional_config or {}).get("fastav")
    own = told is None or Plan.from_json(json.dumps(told["plan"])) == chosen
    assert plan is None or told is not None
    answers = ask(llm, questions, None if own else plan)
    found = [difference(answer, reference(q, chosen)) for answer, q in zip(answers, questions, strict=True)]
    assert max(found) < TOLERANCE
