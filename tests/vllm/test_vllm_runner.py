"""vLLM's model runners: which one runs, and what they run besides steps of requests."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import RUNNER, agree, ask, difference, generated, plan_of, sampling
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vllm_exact import GLOBAL, QUESTIONS

from fastav.budgets import Share
from fastav.engines.vllm import compat, guards
from fastav.engines.vllm.models import _sampling
from fastav.engines.vllm.plugin import register
from fastav.engines.vllm.plugin.batches import Batches
from fastav.engines.vllm.plugin.runner_v1 import BatchesV1
from fastav.engines.vllm.plugin.runner_v2 import BatchesV2
from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.plan import Keep, Plan, Step

V2 = pytest.mark.skipif(RUNNER != "V2", reason="model runner V2 alone does this")
TEXT_TOO = Plan((Step(layers="2", method="strided", keep=Keep(all=Share(0.5))),))


def worker_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker


def test_the_runner_is_the_one_that_these_tests_are_for(omni, engines):
    worker = worker_of(engines(omni.folder, "fastav"))
    assert type(worker.pruner.batches) is {"V1": BatchesV1, "V2": BatchesV2}[RUNNER]
    assert isinstance(worker.pruner.batches, Batches)
    module = {"V1": "vllm.v1.worker.gpu_model_runner", "V2": "vllm.v1.worker.gpu.model_runner"}[RUNNER]
    assert module in {base.__module__ for base in type(worker.model_runner).__mro__}


@pytest.mark.parametrize("plan", ["fastav", GLOBAL["strided"]])
def test_runs_without_requests_change_nothing(omni, engines, monkeypatch, plan):
    """A dummy run has attention metadata, but its batch is none of requests."""
    llm = engines(omni.folder, plan)
    engine, worker = llm.llm_engine, worker_of(llm)
    runner, batches, listed, answers = worker.model_runner, worker.pruner.batches, [], {}
    rows = batches.rows
    monkeypatch.setattr(batches, "rows", lambda: listed.append(1) or rows())

    def run_dummy():
        before, steps = [cache.clone() for cache in runner.kv_caches], len(listed)
        runner._dummy_run(8, force_attention=True)
        assert not batches.is_armed
        assert len(listed) == steps
        for old, new in zip(before, runner.kv_caches, strict=True):
            written = (old != new).flatten(2).any(-1).nonzero()  # V1 and V2 may write to the block that is no request's
            assert not written[written.min(-1).values > 0].numel()

    for index, question in enumerate(QUESTIONS[:4]):
        engine.add_request(str(index), question.for_vllm(), sampling(question.new))
        engine.step()
        run_dummy()
    while engine.has_unfinished_requests():
        answers |= {output.request_id: output for output in engine.step() if output.finished}
        run_dummy()
    assert listed
    for index, question in enumerate(QUESTIONS[:4]):
        if str(index) in answers:
            assert difference(generated(answers[str(index)]), omni(question, plan_of(plan, omni))) < 1e-3
    agree(llm, omni, plan, QUESTIONS[:3])


@V2
@pytest.mark.parametrize("plan", ["fastav", TEXT_TOO])
def test_requests_for_warmth_run_unpruned(omni, engines, monkeypatch, plan, steps):
    """As GPU workers do after loading: requests that no scheduler has seen, of any ids, without media."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

    with engines.own(omni.folder, plan) as llm:
        worker, seen = worker_of(llm), []

        def warm_up(worker):
            arguments = worker.model_runner, worker.execute_model, worker.sample_tokens
            warmup_kernels(*arguments)
            assert run_mixed_prefill_decode_warmup(*arguments, worker.model_runner.max_num_tokens)

        start = worker.pruner.start_request
        monkeypatch.setattr(
            worker.pruner, "start_request", lambda name, request: seen.append(name) or start(name, request)
        )
        monkeypatch.setattr(type(worker).__mro__[1], "compile_or_warm_up_model", warm_up)
        worker.compile_or_warm_up_model()
        assert {"_warmup_0_", "_v2_mixed_warmup_decode_", "_v2_mixed_warmup_prefill_"} <= set(seen)
        assert steps
        assert not any(cut for step in steps for _, _, cut in step)
        assert not worker.pruner.request_states
        agree(llm, omni, plan, QUESTIONS[:4])


def test_ids_of_requests_for_warmth_may_be_those_of_media(omni, engines):
    pruner = worker_of(engines(omni.folder, "fastav")).pruner
    request = SimpleNamespace(
        prompt_token_ids=[omni.model.config.video_token_id] * 4, mm_features=[], sampling_params=None
    )

    def started():
        pruner.start_request("w", request)
        try:
            return pruner.request_states["w"]
        finally:
            pruner.end_request("w")

    assert not started().is_unpruned
    with pruner.warm_up():
        state = started()
    assert (state.is_unpruned, state.prompt_len, state.kv_len(7, 3)) == (True, 4, 3)


@V2
def test_media_may_be_gone_once_they_are_encoded(omni, engines):
    """As vLLM 0.33 does: features of a request lose their data when the prompt has run beyond them."""
    llm = engines(omni.folder, GLOBAL["strided"], max_num_batched_tokens=50, max_num_seqs=8)
    engine, cache, answers = llm.llm_engine, worker_of(llm).model_runner.encoder_cache, {}
    question = QUESTIONS[0]
    engine.add_request("0", question.for_vllm(), sampling(question.new))
    while engine.has_unfinished_requests():
        answers |= {output.request_id: output for output in engine.step() if output.finished}
        for name, features in cache.mm_features.items():
            cache.mm_features[name] = [
                replace(feature, data=None) if feature.identifier in cache.encoder_outputs else feature
                for feature in features
            ]
    assert difference(generated(answers["0"]), omni(question, GLOBAL["strided"])) < 1e-3


class Listener:
    def __init__(self):
        self.told = []

    def start_request(self, request_id, request):
        self.told.append((request_id, list(request.prompt_token_ids)))

    def end_request(self, request_id):
        self.told.append(request_id)


def batches_v2(**runner):
    state = object.__new__(compat.DefaultModelState)
    state.rope_state = state.prompt_embeds_state = None
    listener, cache = Listener(), SimpleNamespace(enable_prefix_caching=False)
    return BatchesV2(SimpleNamespace(model_state=state, cache_config=cache, **runner), listener), state, listener


def request_of(name, ids, computed=0):
    return SimpleNamespace(req_id=name, prompt_token_ids=ids, num_computed_tokens=computed)


def test_a_batch_that_another_replaces_is_not_read():
    batches, state, _ = batches_v2()
    batch = SimpleNamespace(
        req_ids=["a", "b"],
        num_reqs=2,
        num_draft_tokens=0,
        num_computed_tokens_np=np.array([5, 0]),
        num_scheduled_tokens=np.array([1, 4]),
    )
    table = torch.arange(8).view(4, 2)  # with rows of padding
    with batches.step(None):
        assert not batches.is_armed
        state.preprocess_state(batch, (table,), None, None)
        batches.prepare(batch)
        assert batches.is_armed
        assert batches.rows() == [("a", 5, 1), ("b", 0, 4)]
        assert batches.block_table(0).tolist() == [[0, 1], [2, 3]]
        batches.prepare(SimpleNamespace(**vars(batch)))
        assert not batches.is_armed
        with pytest.raises(AssertionError, match="no batch of requests"):
            batches.rows()
        state.preprocess_state(batch, (table,), None, None)
    assert not batches.is_armed


def test_requests_end_once_and_begin_again():
    _, state, listener = batches_v2()
    for name in ("a", "b"):
        state.remove_request(name)  # as the runner does before it adds
        state.add_request(0, request_of(name, [1, 2]))
    state.remove_request("a")  # preempted
    state.remove_request("a")
    state.add_request(1, request_of("a", [1, 2]))
    assert listener.told == [("a", [1, 2]), ("b", [1, 2]), "a", ("a", [1, 2])]
    with pytest.raises(UnsupportedPlan, match="a prompt grew"):
        state.add_request(1, request_of("c", [1, 2, 3], computed=2))


@V2
def test_nothing_runs_in_graphs_of_the_whole_model(omni, engines):
    llm = engines(omni.folder, "fastav")
    assert worker_of(llm).pruner.batches.graphs is None
    with pytest.raises(UnsupportedPlan, match="replay with the token counts of their capture"):
        prepare_dummy(worker_of(llm).model_runner, compat.CUDAGraphMode.FULL)


def prepare_dummy(runner, mode):
    """The attention metadata of a batch of four that vLLM would capture."""
    from vllm.v1.worker.gpu.input_batch import InputBatch

    batch = InputBatch.make_dummy(4, 4, runner.input_buffers)
    tables, slots = runner.prepare_dummy_attn(batch)
    return runner.model_state.prepare_attn(
        batch, mode, tables, slots, runner.attn_groups, runner.kv_cache_config, for_capture=True
    )


def test_an_unknown_state_of_a_model_is_refused():
    state = type("MambaState", (compat.DefaultModelState,), {})
    with pytest.raises(UnsupportedModel, match="keeps a MambaState"):
        BatchesV2(SimpleNamespace(model_state=object.__new__(state)), Listener())


@pytest.mark.parametrize("who", ["vLLM", "user", "nobody"])
def test_breakable_graphs_are_refused(omni, engines, monkeypatch, who):
    """vLLM turns them on by itself for some models, after our hook into its configuration."""
    from vllm import envs

    config = engines(omni.folder, "fastav").llm_engine.vllm_config
    pruning = guards.read(config.additional_config, config.model_config.hf_config)
    envs.disable_envs_cache()
    monkeypatch.setattr(config.compilation_config, "splitting_ops", None)  # as where vLLM compiles
    monkeypatch.setattr(config.compilation_config, "cudagraph_mode", compat.CUDAGraphMode.PIECEWISE)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    guards.check(pruning, register._serving(config))
    if who == "user":
        monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    if who == "vLLM":
        monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH")
        monkeypatch.setattr(type(config), "_uses_breakable_cudagraph_by_default", lambda self: True)
        assert config._maybe_enable_breakable_cudagraph()
    if who == "nobody":
        return
    with pytest.raises(UnsupportedPlan, match="CUDA graphs that contain attention"):
        guards.check(pruning, register._serving(config))
    monkeypatch.setattr(config.compilation_config, "cudagraph_mode", compat.CUDAGraphMode.NONE)
    guards.check(pruning, register._serving(config))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_both_penalties_are_the_same(data):
    rows = data.draw(st.integers(1, 4), label="rows")
    slots = data.draw(st.permutations(range(6)), label="slots")[:rows]
    ids = data.draw(st.lists(st.lists(st.integers(0, 10), min_size=9, max_size=9), min_size=6, max_size=6), label="ids")
    lens = st.lists(st.integers(1, 8), min_size=6, max_size=6)
    prompts = torch.tensor(data.draw(lens, label="prompts"))
    totals = torch.maximum(prompts, torch.tensor(data.draw(lens, label="totals")))
    penalties = data.draw(st.lists(st.none() | st.floats(0.5, 2), min_size=6, max_size=6), label="penalties")
    logits = torch.randn(rows, 11, generator=torch.Generator().manual_seed(rows))
    on_device = {"all_token_ids": torch.tensor(ids), "prompt_len": prompts, "total_len": totals}
    states = SimpleNamespace(
        max_num_reqs=6, device="cpu", **{name: SimpleNamespace(gpu=of) for name, of in on_device.items()}
    )
    v2 = _sampling.GeneratedPenaltyV2(None, states)
    v1 = object.__new__(_sampling.GeneratedPenaltyV1)
    params = [SimpleNamespace(extra_args=None if one is None else {_sampling.PENALTY: one}) for one in penalties]
    for slot in range(6):
        assert v2.add_request(slot, params[slot]) == (penalties[slot] is not None)
    context = SimpleNamespace(expanded_idx_mapping=torch.tensor(slots), idx_mapping_np=np.array(slots))
    found = v2.apply(logits.clone(), context)
    for row, slot in enumerate(slots):
        processor = v1.new_req_logits_processor(params[slot])
        said = ids[slot][prompts[slot] : totals[slot]]
        expected = logits[row] if processor is None else processor(said, logits[row])
        torch.testing.assert_close(found[row], expected)


def test_the_penalty_is_by_the_interface_of_the_runner(omni, engines):
    from fastav.engines.vllm.models import ConfigHook

    for uses_v2, name in ((False, "GeneratedPenaltyV1"), (True, "GeneratedPenaltyV2")):
        model = SimpleNamespace(logits_processors=["other:Other"])
        config = SimpleNamespace(use_v2_model_runner=uses_v2, model_config=model)
        for _ in range(2):
            ConfigHook.verify_and_update_config(config)
        assert model.logits_processors == [f"fastav.engines.vllm.models._sampling:{name}", "other:Other"]


def test_nothing_is_asked_twice(omni, engines):
    """A request that has been answered leaves no state at the next step."""
    llm = engines(omni.folder, "fastav")
    ask(llm, QUESTIONS[:2])
    ask(llm, QUESTIONS[1:2])
    assert len(worker_of(llm).pruner.request_states) == 1
