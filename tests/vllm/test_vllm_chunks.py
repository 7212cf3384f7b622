"""Prompts in chunks whose tokens scores select: the same tokens and probabilities as of whole prompts."""

import pytest
from harness import agree
from test_vllm_exact import QUESTIONS

from fastav.plan import Keep, Plan, Share, Step, Tokens

# unpruned, too, vLLM 0.32 says something else of a video with its own sound when it comes in small pieces
ASKED = [question for question in QUESTIONS if not question.together]
BOTH = Keep(audio=Tokens(5), video=Share(0.4))
PLANS = {
    "fastav-plus": "fastav-plus",
    "fastv": "fastv",
    "dart": "dart",
    "divprune": "divprune",
    "pyramiddrop": "pyramiddrop",
    "last-query": Plan(
        (
            Step(layers="4", method="last-query", keep=BOTH),
            Step(layers="5..", method="last-query", keep=Keep(media=Share(0.8))),
        )
    ),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("budget", [16, 50])
def test_scored_plans_are_exact_in_chunks(omni, steps, engines, budget, name):
    llm = engines(omni.folder, "fastav-plus", max_num_batched_tokens=budget, max_num_seqs=8, block_size=32)
    agree(llm, omni, PLANS[name], ASKED)
    assert any(computed and cut for step in steps for computed, _, cut in step), "a prompt that went on"
