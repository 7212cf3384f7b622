"""The cache really holds less: blocks of each part of the layers, and how many requests there is room for."""

from math import ceil
from types import SimpleNamespace

import pytest
from harness import TOLERANCE, Question, agree, ask, difference, film, generated, plan_of, sampling, sound
from test_vllm_exact import AUDIO, GLOBAL, QUESTIONS, VIDEO
from vllm.exceptions import VLLMValidationError

from fastav.budgets import Share
from fastav.plan import Keep, Plan, Step

BLOCK = 32
SMALL = {"block_size": BLOCK, "disable_log_stats": False, "enable_prefix_caching": False}
WHOLE = SMALL | {"enable_chunked_prefill": False}  # which the plan `none` would leave as it is
ROLLOUT = Plan((Step(layers="4", method="rollout", keep=Keep(media=Share(0.5))),))
HALF = Plan((Step(layers="middle", method="strided", keep=Keep(all=Share(0.2))),))
LONG = [
    Question(text=f"{n} {VIDEO} and {AUDIO} tell", video=film(8, n), audio=sound(3, n), new=20) for n in range(1, 5)
]


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def blocks_of(scheduler):
    """Of each request that has any, how many blocks each part of the cache gives it, by the part's first layer."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    managers = [m for m in managers if type(m).__name__ != "HeldManager"]  # of states, while a prompt runs
    requests = {name for manager in managers for name, blocks in manager.req_to_blocks.items() if blocks}
    return {
        name: {getattr(m.kv_cache_spec, "first_layer", 0): len(m.req_to_blocks[name]) for m in managers}
        for name in requests
    }


def answered(llm, questions):
    """The most blocks that were taken at once, the most requests that ran at once, and those of each in every step."""
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    free, most, together, seen = pool.get_num_free_blocks(), 0, 0, []
    for at, question in enumerate(questions):
        engine.add_request(str(at), question.for_vllm(), sampling(question.new))
    while engine.has_unfinished_requests():
        engine.step()
        most, together = max(most, free - pool.get_num_free_blocks()), max(together, len(scheduler.running))
        seen.append(
            {
                name: (scheduler.requests[name].num_prompt_tokens, scheduler.requests[name].num_computed_tokens, blocks)
                for name, blocks in blocks_of(scheduler).items()
            }
        )
    assert pool.get_num_free_blocks() == free
    assert not scheduler.request_states
    return most, together, seen


@pytest.mark.parametrize("plan", ["fastav", HALF, "none"])
def test_every_part_has_blocks_for_what_it_holds(omni, engines, monkeypatch, plan):
    llm = engines(omni.folder, plan, **SMALL if plan is HALF else WHOLE)
    scheduler = scheduler_of(llm)
    kept = {}

    def noted(request, add=scheduler.add_request):
        add(request)
        kept[request.request_id] = scheduler.request_states[request.request_id]

    monkeypatch.setattr(scheduler, "add_request", noted)
    _, _, seen = answered(llm, LONG)
    assert seen
    parts = {part for step in seen for _, _, blocks in step.values() for part in blocks}
    assert parts == ({0} if plan == "none" else {0, 4} if plan is HALF else {0, 2, 4, 6})
    for step in seen:
        for name, (prompt, computed, blocks) in step.items():
            for part, number in blocks.items():
                assert number == ceil(kept[name].kv_len(part, computed) / BLOCK)
                assert number == ceil(computed / BLOCK) or (part >= 4 and prompt > BLOCK)
    decoding = [blocks for step in seen for prompt, computed, blocks in step.values() if computed > prompt]
    assert decoding
    assert plan == "none" or all(blocks[4] < blocks[0] for blocks in decoding)


def test_more_requests_fit_the_same_memory(omni, engines):
    room = {"kv_cache_memory_bytes": 13 * BLOCK * 8 * 512, "enable_chunked_prefill": False, **SMALL}
    found = {}
    for plan in ("none", HALF):
        llm = engines(omni.folder, plan, **room)
        found[plan] = answered(llm, LONG)[1]
        agree(llm, omni, plan, LONG)
    assert found[HALF] > found["none"], found


def test_what_typical_prompts_take_is_logged(omni, engines, monkeypatch):
    from fastav.engines.vllm.plugin import scheduler as plugin

    lines = []
    monkeypatch.setattr(plugin, "log", SimpleNamespace(info=lambda text, *values: lines.append(text % values)))
    with engines.own(omni.folder, HALF, **SMALL) as llm:
        free = scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()
    whole, held = 2 * (256 // BLOCK), 256 // BLOCK + ceil(256 / 5 / BLOCK)
    room = f"there is room for {free / held:.1f} at once, not {free / whole:.1f}"
    assert lines == [f"fastav: a typical prompt of 255 tokens takes {held} blocks, not {whole}: {room}"]


PLANS = ["none", "fastav", "fastav-plus", "fastv@0.25", HALF.to_json(), GLOBAL["strided"].to_json()]


@pytest.mark.parametrize("server", ["none", "fastav"])
def test_requests_name_plans_of_their_own(omni, engines, server):
    questions = [QUESTIONS[0], QUESTIONS[3], QUESTIONS[4], QUESTIONS[2], QUESTIONS[1], QUESTIONS[0], QUESTIONS[3]]
    plans = [*PLANS, None]
    llm = engines(omni.folder, server, **WHOLE)
    params = [
        sampling(q.new, extra_args={} if plan is None else {"fastav": plan})
        for q, plan in zip(questions, plans, strict=True)
    ]
    outputs = llm.generate([q.for_vllm() for q in questions], params, use_tqdm=False)
    for output, question, plan in zip(outputs, questions, plans, strict=True):
        chosen = Plan.from_json(plan) if plan and plan.startswith("{") else plan_of(plan or server, omni)
        assert difference(generated(output), omni(question, chosen)) < TOLERANCE
    for plan, words in [
        ("fastaw", "did you mean"),
        ("{", "JSON"),
        ("mine.json", "cannot name a file"),
        (3, "plan must be a string"),
        ("omnizip", "method 'omnizip' reads audio-encoder"),
    ]:
        with pytest.raises(VLLMValidationError, match=words):
            llm.generate([questions[0].for_vllm()], sampling(2, extra_args={"fastav": plan}), use_tqdm=False)
    (after,) = ask(llm, [QUESTIONS[2]])
    assert difference(after, omni(QUESTIONS[2], plan_of(server, omni))) < TOLERANCE


def test_pieces_and_servers_that_do_not_prune_refuse_plans_of_requests(omni, engines):
    llm = engines(omni.folder, HALF, **SMALL)  # by the layout alone: prompts may come in pieces
    (output,) = llm.generate([LONG[0].for_vllm()], sampling(2, extra_args={"fastav": "none"}), use_tqdm=False)
    assert list(output.outputs[0].token_ids) == omni(LONG[0], Plan())[1][:2]
    agree(llm, omni, "fastav", LONG[:1])
    agree(llm, omni, ROLLOUT, LONG[:1])  # at once, as it fits into a step
    llm = engines(omni.folder, HALF, **SMALL, max_num_batched_tokens=64, max_num_seqs=8)
    with pytest.raises(VLLMValidationError, match=r"this prompt has 1\d\d tokens, and a step 64"):
        llm.generate([LONG[0].for_vllm()], sampling(2, extra_args={"fastav": ROLLOUT.to_json()}), use_tqdm=False)
    llm = engines(omni.folder, None)
    with pytest.raises(VLLMValidationError, match="does not prune"):
        llm.generate([LONG[0].for_vllm()], sampling(2, extra_args={"fastav": "fastav"}), use_tqdm=False)
