"""Prompts in chunks whose tokens scores select: the same tokens and probabilities as of whole prompts."""

import pytest
from harness import AUDIO, TOLERANCE, VIDEO, Question, agree, ask, difference, film, generated, plan_of, sampling, sound
from test_vllm_exact import QUESTIONS
from test_vllm_serving import preempted
from vllm.exceptions import VLLMValidationError

from fastav.budgets import Share, Tokens
from fastav.plan import Keep, Plan, Step

# unpruned, too, vLLM 0.32 says something else of a video with its own sound when it comes in small pieces
ASKED = [question for question in QUESTIONS if not question.together]
BOTH = Keep(audio=Tokens(5), video=Share(0.4))
MOST = Keep(media=Share(0.8))
PLANS = {
    "fastav-plus": "fastav-plus",
    "fastv": "fastv",
    "dart": "dart",
    "divprune": "divprune",
    "pyramiddrop": "pyramiddrop",
    "fine": Plan(
        (Step(layers="4", method="last-query", keep=BOTH), Step(layers="5..", method="last-query", keep=MOST))
    ),
    "signals": Plan(
        (
            Step(layers="2", method="text-queries", keep=Keep(audio=Share(0.7), video=Share(0.7))),
            Step(layers="4", method="window", keep=BOTH),
            Step(layers="6", method="last-query", keep=MOST),
        )
    ),
    "text": Plan(
        (
            Step(layers="2", method="window", keep=Keep(all=Share(0.7))),
            Step(layers="3..", method="text-queries", keep=Keep(all=Share(0.7))),
        )
    ),
    "layout first": Plan(
        (
            Step(layers="1", method="strided", keep=Keep(media=Share(0.7))),
            Step(layers="3", method="last-query", keep=MOST),
            Step(layers="5", method="strided", keep=Keep(media=Share(0.5))),
        )
    ),
    "nothing enters": Plan(
        (
            Step(layers="0", method="position", keep=Keep(media=Tokens(0))),
            Step(layers="3", method="last-query", keep=Keep(all=Share(0.9))),
        )
    ),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("budget", [16, 50])
def test_scored_plans_are_exact_in_chunks(omni, steps, engines, budget, name):
    llm = engines(omni.folder, "fastav-plus", max_num_batched_tokens=budget, max_num_seqs=8, block_size=32)
    agree(llm, omni, PLANS[name], ASKED)
    assert any(computed and cut for step in steps for computed, _, cut in step), "a prompt that went on"


QUESTION = (
    "tell what it is, and for how long it can be seen and heard in all of this"  # withheld from steps of few tokens
)
LONG = [
    Question(text=f"{n} {VIDEO} and {AUDIO} {QUESTION}", video=film(8, n), audio=sound(3, n), new=20) for n in range(6)
]


def test_no_step_costs_more_than_the_budget(omni, engines, monkeypatch):
    from fastav.engines.vllm.plugin import decoder

    seen = []

    def noted(expected, record, check=decoder.require_step):
        check(expected, record)
        seen.append([[call.num_queries for call in calls] for calls in record.calls])

    monkeypatch.setattr(decoder, "require_step", noted)
    for budget in (32, 64):
        llm = engines(omni.folder, "fastav-plus", max_num_batched_tokens=budget, max_num_seqs=8, block_size=32)
        agree(llm, omni, PLANS["fine"], [*LONG, *ASKED[:3]])
        most = max(count for step in seen for counts in step for count in counts)
        assert budget // 2 < most <= budget, "tokens that a layer runs on at once"
        assert max(sum(map(sum, step)) for step in seen) <= budget * len(seen[0])
        assert any(len(counts) > 1 for step in seen for counts in step)
        seen.clear()


@pytest.mark.parametrize("name", ["fine", "fastav-plus"])
def test_a_preempted_prompt_in_chunks_goes_on_exactly(omni, engines, name):
    room = {"block_size": 32, "kv_cache_memory_bytes": 17 * 32 * 8 * 512, "disable_log_stats": False}
    llm = engines(omni.folder, "fastav-plus", max_num_batched_tokens=48, max_num_seqs=8, **room)
    before = preempted(llm)
    growing = [Question(text=q.text.replace(QUESTION, "tell"), video=q.video, audio=q.audio, new=80) for q in LONG]
    agree(llm, omni, PLANS[name], growing)
    assert preempted(llm) > before


def test_states_may_outlast_their_prompt_by_a_step(omni, engines, monkeypatch):
    """As where vLLM schedules a step before the one before it has ended, which a CPU does not do."""
    from fastav.engines.vllm.plugin.kv_cache import HeldManager

    free = HeldManager.remove_skipped_blocks
    monkeypatch.setattr(HeldManager, "remove_skipped_blocks", lambda self, name, done, n: free(self, name, done - 1, n))
    llm = engines(omni.folder, "fastav-plus", max_num_batched_tokens=48, max_num_seqs=8, block_size=32)
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    before = pool.get_num_free_blocks()
    agree(llm, omni, "fastav-plus", LONG[:2])
    assert pool.get_num_free_blocks() == before


def test_prompts_that_end_within_their_chunks_leave_the_others_exact(omni, engines):
    llm = engines(omni.folder, "fastav-plus", max_num_batched_tokens=48, max_num_seqs=8, block_size=32)
    engine, answers = llm.llm_engine, {}
    scheduler = engine.engine_core.engine_core.scheduler
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    for at, question in enumerate(LONG):
        engine.add_request(str(at), question.for_vllm(), sampling(question.new))
    for step in range(200):
        answers |= {output.request_id: output for output in engine.step() if output.finished}
        if step in (1, 4, 6, 8, 10):
            engine.abort_request([{1: "0", 4: "2", 6: "3", 8: "4", 10: "5"}[step]])
        if step == 5:
            engine.add_request("0", LONG[1].for_vllm(), sampling(LONG[1].new))  # an id that was aborted
        if not engine.has_unfinished_requests():
            break
    assert set(answers) == {"0", "1"}
    expected = omni(LONG[1], plan_of("fastav-plus", omni))
    assert max(difference(generated(answers[at]), expected) for at in ("0", "1")) < TOLERANCE
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    assert not scheduler.request_states


def test_prompts_and_answers_get_on_whatever_room_there_is(omni, engines):
    for settings in (
        {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 4},
        {"max_num_batched_tokens": 256, "long_prefill_token_threshold": 64},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
        {"max_num_batched_tokens": 2, "max_num_seqs": 1},
    ):
        with engines.own(omni.folder, "fastav-plus", block_size=32, **{"max_num_seqs": 8} | settings) as llm:
            engine = llm.llm_engine
            for at, question in enumerate(LONG[:2]):
                engine.add_request(str(at), question.for_vllm(), sampling(2))
            for _ in range(700):
                engine.step()
                if not engine.has_unfinished_requests():
                    break
            assert not engine.has_unfinished_requests(), settings


def test_a_refused_prompt_leaves_its_clip_to_others(omni, engines):
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "block_size": 32, "mm_processor_cache_gb": 1}
    llm = engines(omni.folder, "fastav-plus", **options)
    for _ in range(2):
        with pytest.raises(VLLMValidationError, match="'rollout' reads the attention"):
            ask(llm, LONG[:1], Plan((Step(layers="4", method="rollout", keep=BOTH),)))
        agree(llm, omni, "fastav-plus", LONG[:1])


def test_rollout_in_chunks_is_refused(omni, engines):
    llm = engines(omni.folder, "fastav-plus", max_num_batched_tokens=48, max_num_seqs=8, block_size=32)
    with pytest.raises(VLLMValidationError, match="'rollout' reads the attention of all tokens in every layer"):
        ask(llm, LONG[:1], Plan((Step(layers="4", method="rollout", keep=BOTH),)))
