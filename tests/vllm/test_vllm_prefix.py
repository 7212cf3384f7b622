"""Prompts with a common prefix: what was computed for one serves the next, exactly."""

import pytest
from harness import AUDIO, VIDEO, Question, agree, film, sound
from test_vllm_chunks import BOTH, MOST
from test_vllm_serving import preempted

from fastav.plan import Keep, Plan, Share, Step

SEEN, HEARD = film(8, 1), sound(3, 1)
ABOUT = [  # a clip, and much to ask
    "what is it?",
    "tell what it is, and for how long it can be seen and heard in all of this",
    "what comes after that, and who says so?",
    "what is it?",
]
ONE_CLIP = [Question(text=f"{VIDEO} and {AUDIO} {text}", video=SEEN, audio=HEARD, new=8) for text in ABOUT]
START = "a text that is as long as a block of the cache, and some words more, so that it can be found again; " * 2
TEXTS = [Question(text=START + word, new=8) for word in ("one", "two", "one")]
HALF = Plan((Step(layers="4", method="last-query", keep=BOTH),))
PLANS = {
    "last query": HALF,
    "question": Plan(
        (Step(layers="4", method="text-queries", keep=BOTH), Step(layers="5..", method="window", keep=MOST))
    ),
    "window": Plan((Step(layers="4", method="window", keep=BOTH),)),
    "keys": Plan((Step(layers="4", method="dart", keep=Keep(media=Share(0.4))),)),
    "layout": Plan((Step(layers="4", method="strided", keep=BOTH), Step(layers="6", method="strided", keep=MOST))),
}
SETTINGS = {"enable_prefix_caching": True, "block_size": 32, "max_num_seqs": 8, "disable_log_stats": False}


def hits(llm):
    """Tokens that were found in the prefix cache so far."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("budget", [48, 256])
def test_questions_about_one_clip_share_its_early_layers_exactly(omni, engines, budget, name):
    llm = engines(omni.folder, HALF, max_num_batched_tokens=budget, **SETTINGS)
    llm.reset_prefix_cache()
    found = []
    for question in ONE_CLIP:
        before = hits(llm)
        agree(llm, omni, PLANS[name], [question])
        found.append(hits(llm) - before)
    assert found[0] == 0
    assert all(tokens >= 64 for tokens in found[1:]), found
    assert all(tokens % 32 == 0 for tokens in found)


def test_all_at_once_are_exact(omni, engines):
    llm = engines(omni.folder, HALF, max_num_batched_tokens=64, **SETTINGS)
    llm.reset_prefix_cache()
    agree(llm, omni, HALF, [*ONE_CLIP, *TEXTS, *ONE_CLIP])
    assert hits(llm)


def test_text_and_unpruned_prompts_share_all_layers(omni, engines):
    llm = engines(omni.folder, HALF, max_num_batched_tokens=256, **SETTINGS)
    llm.reset_prefix_cache()
    for plan in (HALF, "none"):
        for question in TEXTS:
            before = hits(llm)
            agree(llm, omni, plan, [question])
        assert hits(llm) - before >= 160
    for question in ONE_CLIP[:2]:
        before = hits(llm)
        agree(llm, omni, "none", [question])
    assert hits(llm) - before >= 64


def test_other_plans_find_nothing_that_is_not_theirs(omni, engines):
    llm = engines(omni.folder, HALF, max_num_batched_tokens=256, **SETTINGS)
    llm.reset_prefix_cache()
    earlier = Plan((Step(layers="2", method="last-query", keep=BOTH),))
    later = Plan((Step(layers="6", method="strided", keep=BOTH),))
    for plan in (HALF, "none", earlier, later, earlier, "fastav-plus"):
        before = hits(llm)
        agree(llm, omni, plan, ONE_CLIP[:1])
        assert hits(llm) == before, plan
    for plan in (HALF, "none"):
        before = hits(llm)
        agree(llm, omni, plan, ONE_CLIP[:1])
        assert hits(llm) > before, plan


def test_other_media_of_the_same_shape_find_nothing(omni, engines):
    llm = engines(omni.folder, HALF, max_num_batched_tokens=256, **SETTINGS)
    llm.reset_prefix_cache()
    for seed in (1, 2):
        before = hits(llm)
        agree(llm, omni, HALF, [Question(text=f"{VIDEO} {ABOUT[1]}", video=film(8, seed))])
        assert hits(llm) == before


def test_evicted_and_preempted_prompts_are_exact(omni, engines):
    room = {"kv_cache_memory_bytes": 24 * 32 * 8 * 512}
    llm = engines(omni.folder, HALF, max_num_batched_tokens=48, **SETTINGS, **room)
    films = [
        Question(text=f"{VIDEO} and {AUDIO} {text}", video=film(8, seed), audio=HEARD, new=60)
        for seed in range(3)
        for text in ("tell", "what is it?")
    ]
    before = preempted(llm)
    for _ in range(2):
        agree(llm, omni, HALF, films)
    assert preempted(llm) > before
