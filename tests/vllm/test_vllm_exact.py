"""Pruned inside vLLM or by the transformers engine: the same tokens, and the same probabilities."""

import pytest
from harness import AUDIO, IMAGE, VIDEO, Question, agree, film, questions, sound

from fastav.budgets import Before, Share, Tokens
from fastav.plan import Keep, Plan, Step
from fastav.presets import fastav

QUESTIONS = questions(AUDIO, VIDEO, IMAGE)
BOTH = Keep(audio=Tokens(5), video=Share(0.4))
GLOBAL = {
    "position": Plan((Step(layers="middle", method="position", keep=Keep(media=Before(40))),)),
    "strided": Plan((Step(layers="0", method="strided", keep=BOTH), Step(layers="5", method="strided", keep=BOTH))),
    "random": Plan((Step(layers="1", method="random", keep=Keep(all=Share(0.6))),)),
    "last": Plan((Step(layers="7", method="keep-first", keep=BOTH),)),
    "nothing": Plan((Step(layers="2", method="position", keep=Keep(media=Tokens(0))),)),
}


WHOLE = {"max_num_batched_tokens": 2048}  # all prompts at once


def test_without_a_plan_nothing_is_pruned(omni, steps, engines):
    llm = engines(omni.folder, None, **WHOLE)
    assert type(llm.llm_engine.model_executor.driver_worker.worker).__name__ == "CPUWorker"
    agree(llm, omni, None, QUESTIONS)
    assert not steps


@pytest.mark.parametrize("name", GLOBAL)
def test_a_global_cut_is_exact(omni, steps, engines, name):
    agree(engines(omni.folder, GLOBAL["position"]), omni, GLOBAL[name], QUESTIONS)
    assert any({cut for _, _, cut in step} == {True, False} for step in steps), "prompts beside answers"


@pytest.mark.parametrize("name", ["position", "strided", "nothing"])
@pytest.mark.parametrize("budget", [16, 50])
def test_a_global_cut_is_exact_in_pieces(omni, steps, engines, budget, name):
    # unpruned, too, vLLM 0.32 says something else of a video with its own sound when it comes in pieces as small
    questions = [question for question in QUESTIONS if not question.together]
    llm = engines(omni.folder, GLOBAL["strided"], max_num_batched_tokens=budget, max_num_seqs=8)
    agree(llm, omni, GLOBAL[name], questions)
    assert any(computed and cut for step in steps for computed, _, cut in step), "a prompt that went on"


@pytest.mark.parametrize("plan", ["fastav", "fastav-plus", "fastav-trim"])
def test_presets_are_exact(omni, steps, engines, plan):
    agree(engines(omni.folder, "fastav"), omni, plan, QUESTIONS)


ASKING = Plan(
    (
        Step(layers="2", method="rollout", keep=BOTH),
        Step(layers="4", method="text-queries", keep=Keep(audio=Share(0.7), video=Share(0.7))),
        Step(layers="6..", method="window", keep=Keep(media=Share(0.7))),
    )
)


def test_every_signal_of_the_decoder_is_exact(omni, engines):
    agree(engines(omni.folder, "fastav"), omni, ASKING, QUESTIONS)


def test_text_may_be_cut_too(omni, engines):
    plan = fastav(Keep(all=Share(0.7)), start=2, drop=0.3, exempt_text=False)
    agree(engines(omni.folder, "fastav"), omni, plan, QUESTIONS)


@pytest.mark.parametrize("plan", ["fastv", "pyramiddrop", "dart", "divprune", "vtw"])
def test_recipes_are_exact(omni, engines, plan):
    agree(engines(omni.folder, "fastav"), omni, plan, QUESTIONS)


SEVERAL = [
    Question(
        text=f"{AUDIO} and {VIDEO} and {AUDIO} what?", video=film(4, 1), audio=sound(1, 2), more_audio=(sound(2, 3),)
    ),
    Question(text=f"of {IMAGE}{IMAGE} which?", image=film(0.5, 4)[0], more_images=(film(0.5, 5)[0],)),
]


@pytest.mark.parametrize("method", ["keep-first", "position", "last-query"])
def test_several_media_of_a_kind_are_told_apart(omni, engines, method):
    plan = Plan((Step(layers="4", method=method, keep=Keep(audio=Share(0.5), image=Share(0.5), video=Share(0.4))),))
    agree(engines(omni.folder, "fastav", **WHOLE), omni, plan, SEVERAL)


SIGHT = "<|vision_start|><|video_pad|><|vision_end|>"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
SHOWN = [
    Question(text=f"see {SIGHT} what is it?", video=film(4, 1, 24), new=9),
    Question(text="only text", new=17),
    Question(text=f"{SIGHT} and for how long?", video=film(8, 2, 24)),
    Question(
        text=f"beside a picture {PICTURE} what of {SIGHT} is new?", image=film(0.5, 3, 48)[0], video=film(4, 5, 24)
    ),
    Question(text=f"{PICTURE} alone", image=film(0.5, 4, 48)[0]),
]


@pytest.mark.parametrize("plan", ["fastav", "fastav-plus", GLOBAL["position"]])
def test_qwen2_5_vl_is_exact(sight, engines, plan):
    agree(engines(sight.folder, "fastav"), sight, plan, SHOWN)
