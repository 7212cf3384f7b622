"""VideoLLaMA2, video-SALMONN 2 and the embedded model served by vLLM: the answers of the transformers engine."""

import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import clip_checkpoints
import numpy as np
import openai
import pytest
import torch
from harness import TOLERANCE, difference, generated, sampling
from test_vllm_serving import server
from vllm.exceptions import VLLMValidationError

import fastav
from fastav.adapter import plan_named
from fastav.budgets import Share, Tokens
from fastav.engines.transformers import prune
from fastav.errors import FastAVError
from fastav.media import Clip
from fastav.models.tiny import TinyAdapter
from fastav.plan import Keep, Plan, Step
from fastav.registry import MODELS
from fastav.request import Request, Use
from vllm import LLM

BUNDLES = clip_checkpoints.BUNDLES
FILM, SOUND = BUNDLES / "videollama2" / "clip.mp4", BUNDLES / "videollama2" / "sound.wav"
LONG = BUNDLES / "video_salmonn2" / "clip_long.mp4"  # with two pieces of sound
TOY = Path(fastav.__file__).parent / "assets" / "clips"
BY_LAYOUT = Plan(
    (
        Step(layers="2", method="strided", keep=Keep(audio=Tokens(5), video=Share(0.4))),
        Step(layers="4", method="unpadded", keep=Keep(audio=Share(0.5))),
    )
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """clip: that the question is about, if any. shown: as which of vLLM's modalities. use: of its tracks."""

    text: str
    clip: Path | None = None
    shown: str = "video"
    use: Use = Use.AUTO
    new: int = 6

    def for_vllm(self, processor: Any) -> dict[str, Any]:
        if self.clip is None:
            return {"prompt": processor.prompt(self.text, video=False)}
        prompt: dict[str, Any] = {"prompt": processor.prompt(self.text, video=self.shown == "video", audio=True)}
        prompt["multi_modal_data"] = {self.shown: self.clip}
        return prompt | ({} if self.use is Use.AUTO else {"mm_processor_kwargs": {"use": str(self.use)}})


QUESTIONS = [
    Question(text="What moves, and what is heard?", clip=FILM, new=9),
    Question(text="a question of some length, about nothing at all that one could see", new=17),
    Question(text="hear", clip=SOUND, shown="audio", new=12),
    Question(text="only look: the word <video> is a word", clip=FILM, use=Use.VIDEO),
    Question(text="only hear the film", clip=FILM, shown="audio"),
    Question(text="<sound>", new=5),
    Question(text="?", clip=LONG, new=8),
]


class Reference:
    """A checkpoint, and the answers of the transformers engine."""

    def __init__(self, name: str, folder: Path):
        self.folder, self.adapter = folder, MODELS[name]()
        self.cache: dict[Any, Any] = {}

    @cached_property
    def loaded(self):
        model, processor = self.adapter.load(str(self.folder), dtype=torch.float32)
        model.generation_config.eos_token_id = None  # all answers are as long as asked
        return model, processor

    def __call__(self, question: Question, plan: Plan):
        key = question, plan.fingerprint
        if key not in self.cache:
            self.cache[key] = self.computed(question, plan)
        return self.cache[key]

    def computed(self, question: Question, plan: Plan):
        model, processor = self.loaded
        if question.clip is None:
            inputs = dict(processor(processor.prompt(question.text, video=False)))
            layouts = self.adapter.layouts(model.config, inputs)
        else:
            use = Use.AUDIO if question.shown == "audio" else question.use
            request = Request(clip=Clip.open(question.clip), question=question.text, use=use)
            prepared = self.adapter.prepare(processor, [request])
            inputs, layouts = dict(prepared.inputs), prepared.layouts
        with prune(model, plan, layouts=layouts, adapter=self.adapter), torch.inference_mode():
            out = model.generate(
                **inputs,
                max_new_tokens=question.new,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        length = inputs["input_ids"].shape[1]
        return length, out.sequences[0, length:].tolist(), torch.cat(out.logits).log_softmax(-1)

    def agree(self, llm, questions, plan, named=False, **options):
        """named: whether the requests name the plan, which is not the engine's."""
        chosen = plan_named(plan or "none", self.adapter)
        options |= {"extra_args": {"fastav": chosen.to_json()}} if named else {}
        prompts = [question.for_vllm(self.loaded[1]) for question in questions]
        params = [sampling(question.new, **options) for question in questions]
        answers = llm.generate(prompts, params, use_tqdm=False)
        found = [difference(generated(one), self(q, chosen)) for one, q in zip(answers, questions, strict=True)]
        assert max(found) < TOLERANCE


@pytest.fixture(scope="module")
def penalized(tmp_path_factory):
    folder = clip_checkpoints.videollama2(tmp_path_factory.mktemp("penalized"), repetition_penalty=1.3)
    return Reference("videollama2", folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {
        "videollama2": Reference("videollama2", clip_checkpoints.videollama2(folder / "videollama2")),
        "video-salmonn2": Reference("video-salmonn2", clip_checkpoints.video_salmonn2(folder / "video_salmonn2")),
        "tiny": Reference("tiny", Path(TinyAdapter.checkpoint)),
    }


ROOM = {"max_model_len": 2048, "max_num_batched_tokens": 2048, "allowed_local_media_path": str(BUNDLES)}
PLANS = {None: None, "fastav": "fastav", "plus": "fastav-plus", "trim": "fastav-trim", "by-layout": BY_LAYOUT}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["tiny", "video-salmonn2", "videollama2"])
def test_clips_and_text_asked_at_once_are_exact(models, engines, name, plan):
    llm = engines(models[name].folder, plan and "fastav", **ROOM)
    models[name].agree(llm, QUESTIONS, PLANS[plan], named=plan not in (None, "fastav"))


def test_clips_in_memory_and_clips_that_come_again_are_exact(models, engines):
    question, model = QUESTIONS[0], models["videollama2"]
    prompt, llm = question.for_vllm(model.loaded[1]), engines(model.folder, "fastav", **ROOM)
    for clip in (FILM, str(FILM), FILM.read_bytes(), FILM.read_bytes(), Clip.open(FILM), [Clip.open(FILM)]):
        again = prompt | {"multi_modal_data": {"video": clip}}
        (answer,) = llm.generate([again], sampling(question.new), use_tqdm=False)
        chosen = plan_named("fastav", model.adapter)
        assert difference(generated(answer), model(question, chosen)) < TOLERANCE


@pytest.mark.parametrize("name", ["videollama2", "video-salmonn2"])
def test_a_clip_that_comes_in_pieces_is_exact(models, engines, name, steps):
    llm = engines(models[name].folder, BY_LAYOUT, **ROOM | {"max_num_batched_tokens": 64, "max_num_seqs": 8})
    models[name].agree(llm, QUESTIONS, BY_LAYOUT)
    assert any(computed and cut for step in steps for computed, _, cut in step), "a prompt that went on"


@pytest.mark.parametrize("plan", [None, "fastav"])
def test_a_penalty_sees_only_what_was_generated(penalized, engines, plan):
    llm = engines(penalized.folder, plan, **ROOM)
    penalized.agree(llm, QUESTIONS[:3], plan, repetition_penalty=1.3)
    assert llm.get_default_sampling_params().repetition_penalty == 1.3


def test_clips_that_cannot_be_shown_are_refused_in_words(models, engines, tmp_path):
    cut, empty = tmp_path / "cut.mp4", tmp_path / "empty.mp4"
    cut.write_bytes(FILM.read_bytes()[:4000])
    empty.touch()
    question = QUESTIONS[0]
    prompt = question.for_vllm(models["videollama2"].loaded[1])
    llm = engines(models["videollama2"].folder, "fastav", **ROOM)

    def refused(words, given, **more):
        with pytest.raises((VLLMValidationError, ValueError), match=words):
            llm.generate([prompt | {"multi_modal_data": given} | more], sampling(1), use_tqdm=False)

    refused("cut short", {"video": cut})
    refused("is empty", {"video": empty})
    refused("no such file", {"video": tmp_path / "none.mp4"})
    refused("has no video track", {"video": SOUND})
    refused("has no audio track", {"video": silent(tmp_path)}, mm_processor_kwargs={"use": "both"})
    refused("no use of a clip is called", {"video": FILM}, mm_processor_kwargs={"use": "eyes"})
    refused("may have the key use, got fps", {"video": FILM}, mm_processor_kwargs={"fps": 2})
    refused("must be a path", {"video": np.zeros((2, 4, 4, 3), np.uint8)})
    refused("takes one clip", {"video": FILM, "audio": SOUND})
    refused("At most 1 video", {"video": [FILM, FILM]})
    refused("has no <video> for its clip", {"video": FILM}, prompt="no place")
    models["videollama2"].agree(llm, [question], "fastav")


@pytest.mark.parametrize("name", ["videollama2", "video-salmonn2"])
def test_a_chat_has_the_prompt_that_our_processor_gives(models, engines, name):
    _, processor = models[name].loaded
    film = {"type": "video_url", "video_url": {"url": FILM.as_uri()}}
    sound = {"type": "audio_url", "audio_url": {"url": SOUND.as_uri()}}
    ours = {"video": {"type": "video"}, "audio": {"type": "audio"}}
    chats = [
        [("user", [film, "what is it?"])],
        [("user", ["first the words, <video> too,", sound, " then more"])],
        [("system", "be brief"), ("user", [film, "what?"]), ("assistant", "a <video>"), ("user", "and then?")],
        [("user", "no clip, a <video>")],
    ]
    llm = engines(models[name].folder, "fastav", **ROOM)
    for chat in chats:
        turns = [{"role": role, "content": texts(content)} for role, content in chat]
        (output,) = llm.chat(turns, sampling(1), use_tqdm=False)
        same = [{"role": role, "content": texts(content, ours)} for role, content in chat]
        clip = next((part for _, content in chat for part in content if isinstance(part, dict)), None)
        media = {}
        if clip is not None:
            use = Use.AUTO if clip is film else Use.AUDIO
            request = Request(clip=Clip.open(FILM if clip is film else SOUND), question="?", use=use)
            made = models[name].adapter.prepare(processor, [request]).inputs["input_ids"][0].tolist()
            place = "<video>" if clip is film else "<audio>"
            empty = processor.splice(processor.prompt("?", video=clip is film, audio=True), [-1], place)
            start = empty.index(-1)
            media = {"run": made[start : start + len(made) - len(empty) + 1], "place": place}
        text = processor.apply_chat_template(same, add_generation_prompt=True)
        assert output.prompt_token_ids == processor.splice(text, media.get("run", []), media.get("place", ""))


def texts(content: Any, parts: dict[str, Any] | None = None) -> Any:
    """Contents as a client gives them, or, with what stands for clips, as our processor takes them."""
    if isinstance(content, str):
        return content
    kinds = [part if isinstance(part, str) or parts is None else parts[part["type"][:5]] for part in content]
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in kinds]


def test_the_encoders_cannot_be_left_out(models):
    with pytest.raises((FastAVError, ValueError), match="needs its encoders"):
        LLM(str(models["tiny"].folder), language_model_only=True)


def silent(folder: Path) -> Path:
    """A film without sound."""
    from media_files import write_clip

    return write_clip(folder / "silent.mp4", frames=12)


def parts(path: Path, how: str = "video_url") -> dict[str, Any]:
    data = base64.b64encode(path.read_bytes()).decode()
    if how == "input_audio":
        return {"type": how, how: {"data": data, "format": path.suffix[1:]}}
    return {"type": how, how: {"url": f"data:{how[:5]}/{path.suffix[1:]};base64,{data}"}}


def about(question: str, *shown: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


ASKED = {  # what is shown, how, and the clip and use that the same is to the pipeline
    "which color moves?": (parts(TOY / "triangle.mp4"), {}, TOY / "triangle.mp4", Use.AUTO),
    "what sound do you hear?": (parts(TOY / "triangle.mp4"), {}, TOY / "triangle.mp4", Use.AUTO),
    "how many beeps are there?": (parts(TOY / "knock.mp4"), {}, TOY / "knock.mp4", Use.AUTO),
    "which shape moves?": (parts(TOY / "mismatch.mp4"), {"use": "video"}, TOY / "mismatch.mp4", Use.VIDEO),
    "what pitch is the sound?": (parts(TOY / "knock.mp4", "audio_url"), {}, TOY / "knock.mp4", Use.AUDIO),
    "what do you hear?": (parts(SOUND, "input_audio"), {}, SOUND, Use.AUDIO),
}


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory):
    flags = ("--max-model-len", "1024", "--trust-request-mm-kwargs")
    log = tmp_path_factory.mktemp("server") / "log"
    with server(Path(TinyAdapter.checkpoint), "fastav", log, *flags) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("plan", ["fastav", "fastav-plus"])
def test_the_openai_client_gets_what_the_pruned_pipeline_says(tiny_server, tmp_path, plan):
    pipe, client = fastav.pipeline("tiny", plan), tiny_server
    named = {} if plan == "fastav" else {"vllm_xargs": {"fastav": plan}}
    expecting = {q: pipe(clip, q, use=use, max_new_tokens=16) for q, (_, _, clip, use) in ASKED.items()}

    def ask(messages, options=None, **more):
        extra = {"return_token_ids": True} | named | ({"mm_processor_kwargs": options} if options else {})
        return client.chat.completions.create(
            model="omni", messages=messages, max_tokens=16, temperature=0, extra_body=extra, **more
        )

    def check(question):
        shown, options, clip, use = ASKED[question]
        answer = ask(about(question, shown), options)
        expected = expecting[question]
        request = Request(clip=Clip.open(clip), question=question, use=use)
        prepared = pipe.adapter.prepare(pipe.engine.processor, [request])
        assert answer.prompt_token_ids == prepared.inputs["input_ids"][0].tolist()
        tokens = answer.choices[0].token_ids
        assert tuple(tokens[: len(expected.token_ids)]) == expected.token_ids
        assert len(tokens) - len(expected.token_ids) == (expected.finish == "stop")  # vLLM's has the end marker
        assert answer.choices[0].message.content.strip() == expected.text
        return expected.text

    with ThreadPoolExecutor(len(ASKED)) as pool:
        answers = list(pool.map(check, ASKED))
    assert answers[:2] == ["green", "chirp"]
    text = pipe.engine.processor.prompt("which color moves?", video=False)
    ids = pipe.engine.processor(text)["input_ids"][0].tolist()
    assert ask([{"role": "user", "content": "which color moves?"}]).prompt_token_ids == ids
    shown = parts(TOY / "triangle.mp4")
    pieces = ask(about("which color moves?", shown), stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces).strip() == "green"

    cut = tmp_path / "cut.mp4"
    cut.write_bytes((TOY / "knock.mp4").read_bytes()[:2000])
    for words, given in {
        "cut short": [parts(cut)],
        "has no video track": [parts(SOUND)],
        "has no audio track": [parts(silent(tmp_path), "audio_url")],
        "At most 1 video": [shown, parts(SOUND, "input_audio")],
        "At most 0 image": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
        "base64": [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,!"}}],
    }.items():
        with pytest.raises(openai.BadRequestError, match=words):
            ask(about("what?", *given))
    with pytest.raises(openai.BadRequestError, match="no use of a clip is called"):
        ask(about("what?", shown), {"use": "eyes"})
    check("which color moves?")
