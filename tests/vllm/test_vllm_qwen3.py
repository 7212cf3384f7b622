"""The Qwen3 decoders: deepstack adds what the vision tower saw to the hidden states of the first layers."""

import pytest
from harness import Question, agree, film, questions
from test_vllm_exact import ASKING, BOTH, WHOLE

from fastav.budgets import Before, Share
from fastav.plan import Keep, Plan, Step

AUDIO = "<|audio_start|><|audio_pad|><|audio_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
QUESTIONS = questions(AUDIO, VIDEO, IMAGE)
SHOWN = [
    Question(text=f"see {VIDEO} what is it?", video=film(4, 1, 24), new=9),
    Question(text="only text", new=17),
    Question(text=f"{VIDEO} and for how long?", video=film(8, 2, 24)),
    Question(text=f"beside a picture {IMAGE} what of {VIDEO} is new?", image=film(0.5, 3, 48)[0], video=film(4, 5, 24)),
]
EARLY = {  # before deepstack has added anything, among its layers, and after them
    "before": Plan((Step(layers="0", method="position", keep=Keep(media=Before(40))),)),
    "among": Plan((Step(layers="1", method="strided", keep=BOTH), Step(layers="2", method="strided", keep=BOTH))),
    "by scores": Plan((Step(layers="1..2", method="last-query", keep=Keep(media=Share(0.7))),)),
    "after": Plan((Step(layers="middle", method="position", keep=Keep(media=Before(40))),)),
}


def test_without_a_plan_nothing_is_pruned(omni3, steps, engines):
    agree(engines(omni3.folder, None, **WHOLE), omni3, None, QUESTIONS)
    assert not steps


@pytest.mark.parametrize("name", EARLY)
def test_deepstack_adds_to_what_stays(omni3, engines, name):
    agree(engines(omni3.folder, "fastav"), omni3, EARLY[name], QUESTIONS)


@pytest.mark.parametrize("name", ["before", "among"])
@pytest.mark.parametrize("budget", [16, 50])
def test_deepstack_adds_to_what_stays_of_pieces(omni3, steps, engines, budget, name):
    questions = [question for question in QUESTIONS if not question.together]
    llm = engines(omni3.folder, EARLY["before"], max_num_batched_tokens=budget, max_num_seqs=8)
    agree(llm, omni3, EARLY[name], questions)
    assert any(computed and cut for step in steps for computed, _, cut in step), "a prompt that went on"


@pytest.mark.parametrize("plan", ["fastav", "fastav-plus", ASKING])
def test_qwen3_omni_is_exact(omni3, engines, plan):
    agree(engines(omni3.folder, "fastav"), omni3, plan, QUESTIONS)


def test_a_compiled_mixture_of_experts_is_exact(omni3, engines):
    with engines.own(omni3.folder, "fastav-plus", enforce_eager=False) as llm:
        agree(llm, omni3, "fastav-plus", QUESTIONS)


@pytest.mark.parametrize("plan", ["fastav", "fastav-plus", EARLY["among"], EARLY["by scores"]])
def test_qwen3_vl_is_exact(sight3, engines, plan):
    agree(engines(sight3.folder, "fastav"), sight3, plan, SHOWN)
