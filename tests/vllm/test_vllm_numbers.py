"""The numbers for operators against what the engine in this process does: blocks of the cache, FLOPs of its layers."""

from math import ceil

import pytest
from harness import ask, sampling
from test_vllm_exact import GLOBAL, QUESTIONS
from test_vllm_memory import blocks_of, scheduler_of
from test_vllm_qwen3 import QUESTIONS as QUESTIONS3

from fastav.engines.vllm.plugin import requests
from fastav.engines.vllm.plugin.perf import PrunedPerfMetrics

SMALL = {"block_size": 32, "enable_chunked_prefill": False}


@pytest.fixture
def usages(monkeypatch):
    """The usage of every prompt that the engine takes."""
    seen = []
    monkeypatch.setattr(requests, "collect", seen.append)
    return seen


@pytest.mark.parametrize("plan", ["fastav", GLOBAL["strided"], "none"])
def test_blocks_of_usages_are_those_that_the_engine_gives(omni, engines, usages, plan):
    llm = engines(omni.folder, plan, **SMALL)
    engine, scheduler, given = llm.llm_engine, scheduler_of(llm), {}
    for at, question in enumerate(QUESTIONS):
        engine.add_request(str(at), question.for_vllm(), sampling(1))
    groups = len(scheduler.kv_cache_manager.coordinator.single_type_managers)
    real = scheduler.schedule

    def schedule(*args, **kwargs):
        output = real(*args, **kwargs)
        given.update({name.partition("-")[0]: sum(blocks.values()) for name, blocks in blocks_of(scheduler).items()})
        return output

    scheduler.schedule = schedule
    try:
        while engine.has_unfinished_requests():
            engine.step()
    finally:
        del scheduler.schedule
    assert len(usages) == len(QUESTIONS)
    for at, one in enumerate(usages):
        assert one.kv_blocks.pruned == given[str(at)]
        assert one.kv_blocks.full == groups * ceil(sum(one.prompt_tokens.values()) / 32)


class Recorded:
    """vLLM's estimates of every step, beside those of the pruned layers."""

    def __init__(self, scheduler, monkeypatch):
        self.steps, estimate = [], PrunedPerfMetrics._estimate
        recorded = self

        def record(metrics, output):
            whole = metrics._metrics.get_step_perf_stats_per_gpu(output)
            stats = estimate(metrics, output)
            computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
            cached = output.scheduled_cached_reqs
            computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            lens = {
                name: (computed[name], tokens, scheduler.request_states[name])
                for name, tokens in output.num_scheduled_tokens.items()
            }
            recorded.steps.append((whole, stats, lens))
            return stats

        monkeypatch.setattr(PrunedPerfMetrics, "_estimate", record)


def layer_flops(text, tokens, length):
    """Of one layer, by the definition: projections, scores and sums over the cache, a gated MLP."""
    hidden, heads, kv_heads = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    head_dim = getattr(text, "head_dim", hidden // heads)
    experts = getattr(text, "num_experts", 0)
    width = text.moe_intermediate_size * text.num_experts_per_tok if experts else text.intermediate_size
    projections = 2 * tokens * hidden * head_dim * (2 * heads + 2 * kv_heads)
    attention = 2 * 2 * heads * head_dim * tokens * length
    return projections + attention + 2 * 3 * tokens * hidden * width


@pytest.mark.parametrize(("model", "plan"), [("omni", "fastav"), ("omni", "none"), ("omni3", "fastav")])
def test_the_flops_of_a_step_are_those_of_the_tokens_that_each_layer_runs_on(
    request, engines, monkeypatch, model, plan
):
    reference = request.getfixturevalue(model)
    with engines.own(reference.folder, plan, **SMALL, disable_log_stats=False, enable_mfu_metrics=True) as llm:
        recorded = Recorded(scheduler_of(llm), monkeypatch)
        ask(llm, (QUESTIONS if model == "omni" else QUESTIONS3)[:4])
        total = sum(m.value for m in llm.get_metrics() if m.name == "vllm:estimated_flops_per_gpu")
    text = reference.model.config.get_text_config(decoder=True)
    assert recorded.steps
    for whole, stats, lens in recorded.steps:
        expected, full = 0, 0
        for computed, tokens, state in lens.values():
            head = 2 * text.hidden_size * text.vocab_size
            expected, full = expected + head, full + head
            before, after = state.kv_lens(computed), state.kv_lens(computed + tokens)
            for layer in range(text.num_hidden_layers):
                expected += layer_flops(text, int(after[layer] - before[layer]), int(after[layer]))
                full += layer_flops(text, tokens, computed + tokens)
        assert stats.num_flops_per_gpu == expected
        assert whole.num_flops_per_gpu == full
        if plan == "none":
            assert (stats.num_read_bytes_per_gpu, stats.num_write_bytes_per_gpu) == (
                whole.num_read_bytes_per_gpu,
                whole.num_write_bytes_per_gpu,
            )
    assert any(stats.num_flops_per_gpu < whole.num_flops_per_gpu for whole, stats, _ in recorded.steps) == (
        plan == "fastav"
    )
    assert total == sum(stats.num_flops_per_gpu for _, stats, _ in recorded.steps)
