"""Buffers for CUDA graphs of decoding steps, which are off: no graph here, but what one would read.

A graph is acted by a function that keeps the metadata and the slots that a capture was given, and later runs the
decoder on them whatever the forward context says. If the buffers were not refilled in place, it would answer wrongly.
"""

from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import RUNNER, agree
from test_plugin import config_of
from test_vllm_exact import GLOBAL, QUESTIONS

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin.batches import ScheduledRequest
from fastav.engines.vllm.plugin.decode_graphs import DecodeGraphs
from fastav.engines.vllm.plugin.register import _has_decode_graphs_only
from fastav.engines.vllm.plugin.request_state import PlanRuntime, RequestState
from fastav.engines.vllm.plugin.step_check import StepRecord
from fastav.errors import UnsupportedPlan

SIZE, BLOCKS = 4, 8


KEPT = (10, 6, 3, 3)  # by four layers, of a prompt of ten tokens
STATE = RequestState(runtime=PlanRuntime(config_of("fastav")), prompt_len=10, prompt_kv_lens=KEPT, keep_masks=())


class StandIn:
    """Batches of a runner with two groups of two layers; a builder returns what it is given."""

    device, is_armed = torch.device("cpu"), False
    step = rows = block_table = prompt_positions = list  # which nothing calls here

    def __init__(self):
        self.built = []

    def kv_groups(self):
        return [["0", "1", "other"], ["2", "3"]]

    def block_size(self, group):
        return SIZE

    def metadata_builder(self, layer_name):
        self.built.append(layer_name)
        return lambda common: common


@pytest.fixture
def graphs():
    return DecodeGraphs(StandIn(), {"a": STATE, "b": STATE}, ["0", "1", "2", "3"], StepRecord(4), 6, 99)


def batch_of(padded):
    starts = np.arange(padded + 1, dtype=np.int32)
    return SimpleNamespace(
        num_reqs_after_padding=padded,
        num_tokens_after_padding=padded,
        query_start_loc=torch.from_numpy(starts),
        query_start_loc_np=starts,
    )


def tables(padded, first):
    return [(torch.arange(padded * BLOCKS) + first + 100 * group).view(padded, BLOCKS).int() for group in range(2)]


def test_buffers_are_refilled_in_place(graphs):
    captured = graphs.prepare(batch_of(4), [], tables(4, 0), for_capture=True)
    assert all((one.slot_mapping == -1).all() for one in captured.values())
    assert all((one.seq_lens == 1).all() for one in captured.values())
    assert {one.max_seq_len for one in captured.values()} == {99}
    addresses = {name: (one.seq_lens.data_ptr(), one.slot_mapping.data_ptr()) for name, one in captured.items()}
    assert len({address for pair in addresses.values() for address in pair}) == 8
    for rows in (
        [ScheduledRequest("a", 12, 1), ScheduledRequest("b", 10, 1)],
        [ScheduledRequest("b", 15, 1), ScheduledRequest("a", 13, 1), ScheduledRequest("b", 10, 1)],
        [ScheduledRequest("a", 20, 1)],
    ):
        blocks = tables(4, len(rows))
        metadata = graphs.prepare(batch_of(4), rows, blocks, for_capture=False)
        for layer, (name, one) in enumerate(metadata.items()):
            assert (one.seq_lens.data_ptr(), one.slot_mapping.data_ptr()) == addresses[name]
            table = blocks[0 if layer < 2 else 1]
            lens = [KEPT[layer] + computed + 1 - 10 for _, computed, _ in rows]
            slots = [int(table[row, (n - 1) // SIZE]) * SIZE + (n - 1) % SIZE for row, n in enumerate(lens)]
            padding = 4 - len(rows)
            assert captured[name].seq_lens.tolist() == lens + [1] * padding
            assert captured[name].slot_mapping.tolist() == slots + [-1] * padding
            assert one.seq_lens_cpu_upper_bound.tolist() == captured[name].seq_lens.tolist()
            assert (one.num_reqs, one.num_actual_tokens, one.max_query_len) == (4, 4, 1)
            assert one.max_seq_len == max(lens)
            assert one.block_table_tensor.data_ptr() == table.data_ptr()
    assert graphs.batches.built == ["0", "1", "2", "3"], "one builder for each layer"


def test_a_replayed_step_is_written_down(graphs):
    graphs.prepare(
        batch_of(4), [ScheduledRequest("a", 12, 1), ScheduledRequest("b", 10, 1)], tables(4, 0), for_capture=False
    )
    calls = [call for (call,) in graphs._record.calls]
    assert [call.seq_lens for call in calls] == [(13, 11), (9, 7), (6, 4), (6, 4)]
    assert [call.max_seq_len for call in calls] == [13, 9, 6, 6]
    assert graphs._record.num_slots == [[2]] * 4


@pytest.mark.parametrize("rows", [[ScheduledRequest("a", 12, 2)], [ScheduledRequest("a", 9, 1)]])
def test_only_decoding_is_replayed(graphs, rows):
    with pytest.raises(UnsupportedPlan, match="does not cut prompts"):
        graphs.prepare(batch_of(1), rows, tables(1, 0), for_capture=False)
    wide = batch_of(2)
    wide.num_tokens_after_padding = 4
    with pytest.raises(UnsupportedPlan, match="one token of each request"):
        graphs.prepare(wide, [], tables(2, 0), for_capture=True)


def test_they_are_off_in_every_version():
    assert not compat.DECODE_GRAPHS
    modes = compat.CUDAGraphMode
    for mode in (modes.FULL, modes.FULL_DECODE_ONLY, modes.FULL_AND_PIECEWISE):
        config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode), use_v2_model_runner=True)
        assert not compat.has_decode_graphs(config)
        assert not _has_decode_graphs_only(config)


@pytest.mark.parametrize("runner", [False, True])
def test_where_they_are_on_graphs_of_prompts_are_not(monkeypatch, runner):
    monkeypatch.setattr(compat, "DECODE_GRAPHS", frozenset({compat.version()}))
    modes = compat.CUDAGraphMode
    for mode, is_taken in ((modes.FULL, False), (modes.FULL_DECODE_ONLY, runner), (modes.FULL_AND_PIECEWISE, runner)):
        config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode), use_v2_model_runner=runner)
        assert _has_decode_graphs_only(config) == is_taken


@contextmanager
def acted(llm, monkeypatch):
    """Decoding steps as replays of what was captured for a batch of four."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    runner, pruner, replays = worker.model_runner, worker.pruner, []
    graphs = pruner.decode_graphs(runner.max_num_reqs, runner.max_model_len)
    monkeypatch.setattr(pruner, "graphs", graphs)
    monkeypatch.setattr(pruner.batches, "graphs", graphs)
    from vllm.v1.worker.gpu.input_batch import InputBatch

    captured = InputBatch.make_dummy(4, 4, runner.input_buffers)
    blocks, slots = runner.prepare_dummy_attn(captured)
    arguments = slots, runner.attn_groups, runner.kv_cache_config
    full = compat.CUDAGraphMode.FULL
    runner.model_state.prepare_attn(captured, full, blocks, *arguments, for_capture=True)
    assert graphs.is_prepared
    with graphs.captured_slots(SimpleNamespace(slot_mapping=dict.fromkeys(graphs.layer_names, slots[0]))):
        at_capture = compat.get_forward_context().slot_mapping
        assert all((slots == -1).all() for slots in at_capture.values())
    forward = pruner.forward

    def run(run_unpruned, *args):
        batch, context = pruner.batches._batch, compat.get_forward_context()
        if batch is None or batch.has_prefill or batch.num_reqs > 4:
            return forward(run_unpruned, *args)
        padded = copy(batch)  # as the runner would pad it
        padded.num_reqs_after_padding = padded.num_tokens_after_padding = batch.num_reqs
        blocks = [table[: batch.num_reqs] for table in pruner.batches._block_tables]
        calls = [list(calls) for calls in pruner._record.calls]
        metadata = graphs.prepare(padded, pruner.batches.rows(), blocks, for_capture=False)
        recorded = [list(calls) for calls in pruner._record.calls]
        pruner._record.clear()
        replayed = copy(context)
        replayed.attn_metadata = {**context.attn_metadata, **metadata}
        count = batch.num_reqs
        replayed.slot_mapping = {**context.slot_mapping, **{n: of[:count] for n, of in at_capture.items()}}
        with compat.override_forward_context(replayed):
            out = run_unpruned()
        assert not any(calls)
        for one, (other,) in zip(recorded, pruner._record.calls, strict=True):
            assert one == [other], "the record of a replay is that of the calls"
        replays.append(count)
        return out

    monkeypatch.setattr(pruner, "forward", run)
    yield replays


@pytest.mark.skipif(RUNNER != "V2", reason="graphs of the whole model are refused with model runner V1")
@pytest.mark.parametrize("plan", ["fastav", "fastav-plus", GLOBAL["strided"]])
def test_a_decoder_that_reads_the_buffers_is_exact(omni, engines, monkeypatch, plan):
    with engines.own(omni.folder, plan) as llm, acted(llm, monkeypatch) as replays:
        agree(llm, omni, plan, QUESTIONS[:4])
        assert len(replays) > 5
