"""VideoLLaMA2, video-SALMONN 2 and the embedded model served by vLLM: what the transformers engine says of the same."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import clip_checkpoints
import pytest
import torch
from asking import TOLERANCE, difference, said, sampling, serving

import fastav
from fastav.adapter import Request, Use, plan_named
from fastav.engines.transformers import prune
from fastav.media import Clip
from fastav.models.tiny import TinyAdapter
from fastav.plan import Keep, Plan, Share, Step, Tokens
from fastav.registry import MODELS

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
    """text: what is asked. clip: what about, if anything. shown: as vLLM's modality. use: what of it."""

    text: str
    clip: Path | None = None
    shown: str = "video"
    use: Use = Use.AUTO
    new: int = 6

    def for_vllm(self, processor: Any) -> dict[str, Any]:
        if self.clip is None:
            return {"prompt": processor.prompt(self.text, video=False)}
        asked: dict[str, Any] = {"prompt": processor.prompt(self.text, video=self.shown == "video", audio=True)}
        asked["multi_modal_data"] = {self.shown: self.clip}
        return asked | ({} if self.use is Use.AUTO else {"mm_processor_kwargs": {"use": str(self.use)}})


QUESTIONS = [
    Question(text="What moves, and what is heard?", clip=FILM, new=9),
    Question(text="a question of some length, about nothing at all that one could see", new=17),
    Question(text="hear", clip=SOUND, shown="audio", new=12),
    Question(text="only look: the word <video> is a word", clip=FILM, use=Use.VIDEO),
    Question(text="only hear the film", clip=FILM, shown="audio"),
    Question(text="<audio>", new=5),
    Question(text="", clip=LONG, new=8),
]


@dataclass(frozen=True)
class Expecting:
    """A checkpoint, and what the transformers engine says of it."""

    name: str
    folder: Path

    @property
    def adapter(self):
        return MODELS[self.name]()

    @cache
    def loaded(self):
        model, processor = self.adapter.load(str(self.folder), dtype=torch.float32)
        model.generation_config.eos_token_id = None  # all answers are as long as asked
        return model, processor

    @cache
    def __call__(self, question: Question, plan: Plan):
        model, processor = self.loaded()
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

    def agree(self, llm, questions, plan, **options):
        prompts = [question.for_vllm(self.loaded()[1]) for question in questions]
        params = [sampling(question.new, **options) for question in questions]
        answers = llm.generate(prompts, params, use_tqdm=False)
        chosen = plan_named(plan or "none", self.adapter)
        found = [difference(said(one), self(q, chosen)) for one, q in zip(answers, questions, strict=True)]
        assert max(found) < TOLERANCE


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {
        "videollama2": Expecting("videollama2", clip_checkpoints.videollama2(folder / "videollama2")),
        "video-salmonn2": Expecting("video-salmonn2", clip_checkpoints.video_salmonn2(folder / "video_salmonn2")),
        "tiny": Expecting("tiny", Path(TinyAdapter.checkpoint)),
    }


ROOM = {"max_model_len": 2048, "max_num_batched_tokens": 2048}


@pytest.mark.parametrize("plan", [None, "fastav", "fastav-plus", "fastav-trim", BY_LAYOUT], ids=str)
@pytest.mark.parametrize("name", ["videollama2", "video-salmonn2", "tiny"])
def test_clips_and_text_asked_at_once_are_exact(models, name, plan):
    with serving(models[name].folder, plan, **ROOM) as llm:
        models[name].agree(llm, QUESTIONS, plan)
