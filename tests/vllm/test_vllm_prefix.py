"""Prompts with a common prefix: what was computed for one serves the next, exactly."""

import pytest
from harness import AUDIO, VIDEO, Question, agree, film, sound
from test_vllm_chunks import BOTH, MOST
from test_vllm_serving import preempted

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step

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


def found(llm, reference, plan, *questions):
    """The tokens of each prompt that were in the prefix cache; the answers are the transformers engine's."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    lookup, tokens = scheduler._get_local_prefix_cache_hit, {}

    def noted(request):
        result = lookup(request)
        tokens[int(request.request_id.partition("-")[0])] = result[1]
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_get_local_prefix_cache_hit", noted)
        agree(llm, reference, plan, list(questions))
    return [tokens[number] for number in sorted(tokens)]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("budget", [48, 256])
def test_questions_about_one_clip_share_its_early_layers_exactly(omni, engines, budget, name):
    llm = engines(omni.folder, HALF, max_num_batched_tokens=budget, **SETTINGS)
    llm.reset_prefix_cache()
    first, *later = (found(llm, omni, PLANS[name], question)[0] for question in ONE_CLIP)
    assert first == 0
    assert all(tokens >= 128 and tokens % 32 == 0 for tokens in later), later


def test_all_at_once_are_exact(omni, engines):
    llm = engines(omni.folder, HALF, max_num_batched_tokens=64, **SETTINGS)
    llm.reset_prefix_cache()
    assert any(found(llm, omni, HALF, *ONE_CLIP, *TEXTS, *ONE_CLIP))


def test_text_and_unpruned_prompts_share_all_layers(omni, engines):
    llm = engines(omni.folder, HALF, max_num_batched_tokens=256, **SETTINGS)
    llm.reset_prefix_cache()
    assert [found(llm, omni, HALF, question) for question in TEXTS] == [[0], [192], [192]]
    assert [found(llm, omni, "none", question) for question in TEXTS] == [[192]] * 3
    assert [found(llm, omni, "none", question) for question in ONE_CLIP[:2]] == [[0], [128]]


def test_other_plans_find_nothing_that_is_not_theirs(omni, engines):
    llm = engines(omni.folder, HALF, max_num_batched_tokens=256, **SETTINGS)
    llm.reset_prefix_cache()
    earlier = Plan((Step(layers="2", method="last-query", keep=BOTH),))
    later = Plan((Step(layers="6", method="strided", keep=BOTH),))
    for plan in (HALF, "none", earlier, later, earlier, "fastav-plus"):
        assert found(llm, omni, plan, ONE_CLIP[0]) == [0], plan
    for plan in (HALF, "none"):
        assert found(llm, omni, plan, ONE_CLIP[0]) == [160], plan


def test_what_a_plan_reads_is_there_whatever_plan_came_before(omni, engines):
    llm = engines(omni.folder, HALF, max_num_batched_tokens=256, **SETTINGS)
    for name in ("layout", "window", "keys"):
        llm.reset_prefix_cache()
        for plan in (PLANS[name], *PLANS.values()):
            found(llm, omni, plan, ONE_CLIP[1])


@pytest.mark.parametrize("name", PLANS)
def test_what_another_request_computes_in_the_same_step_is_there(omni, engines, name):
    llm = engines(omni.folder, PLANS[name], max_num_batched_tokens=512, **SETTINGS | {"block_size": 32})
    llm.reset_prefix_cache()
    assert any(found(llm, omni, PLANS[name], *ONE_CLIP[:3]))


def test_other_media_of_the_same_shape_find_nothing(omni, engines):
    llm = engines(omni.folder, HALF, max_num_batched_tokens=256, **SETTINGS)
    llm.reset_prefix_cache()
    for seed in (1, 2):
        assert found(llm, omni, HALF, Question(text=f"{VIDEO} {ABOUT[1]}", video=film(8, seed))) == [0]


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
