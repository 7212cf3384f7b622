"""What holds on a GPU, shown by stand-ins for what a CPU does not have: kernel blocks, builders with memory, graphs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import RUNNER, agree
from test_plugin import GLOBAL as CUT
from test_plugin import IDS, LAYERS, config_of, prompt
from test_vllm_exact import GLOBAL, QUESTIONS

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin import attention_metadata, register
from fastav.engines.vllm.plugin.attention_metadata import PackedMetadata
from fastav.engines.vllm.plugin.packed_batch import BatchRow, PackedBatch, geometry
from fastav.engines.vllm.plugin.request_state import PlanRuntime
from fastav.engines.vllm.plugin.runner_v1 import BatchesV1
from fastav.engines.vllm.plugin.runner_v2 import BatchesV2

CACHE, KERNEL = 64, 16  # tokens of a block


class Builder:
    """Plans in a buffer of its own, as FlashAttention 3 does: metadata that it built is overwritten by the next."""

    requires_block_table_width = False

    def __init__(self, spec, layer_names, config, device):
        self.spec, self.layer_names, self.buffer = spec, layer_names, torch.zeros(9, dtype=torch.long)

    def build(self, common_prefix_len, common):
        self.buffer[: common.num_reqs] = common.seq_lens
        return SimpleNamespace(common=common, seq_lens=self.buffer[: common.num_reqs], builder=self)


class Backend:
    """A backend whose kernel takes blocks of 16 tokens only."""

    @staticmethod
    def get_builder_cls():
        return Builder

    @staticmethod
    def get_name():
        return "STAND_IN"

    @staticmethod
    def get_supported_kernel_block_sizes(spec=None):
        return [KERNEL]

    @staticmethod
    def supports_block_size(size, spec=None):
        return size == KERNEL


class Listener:
    def start_request(self, request_id, request):
        """Nothing."""

    def end_request(self, request_id):
        """Nothing."""


def attention_groups(kernel_block_size):
    """Two groups of the KV cache, of layers 0 to 3 and 4 to 7."""
    spec = compat.FullAttentionSpec(block_size=CACHE, num_kv_heads=1, head_size=8, dtype=torch.float32)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4), model_config=SimpleNamespace(max_model_len=256)
    )
    config.parallel_config = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1)
    made = []
    for index in range(2):
        names = [str(layer) for layer in range(4 * index, 4 * index + 4)]
        group = compat.AttentionGroup(Backend, names, spec, index)
        group.create_metadata_builders(config, torch.device("cpu"), kernel_block_size)
        made.append([group])
    cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=group.layer_names) for (group,) in made])
    return SimpleNamespace(
        attn_groups=made,
        kv_cache_config=cache,
        vllm_config=config,
        device=torch.device("cpu"),
        kernel_block_sizes=[KERNEL] * 2,
    )


TABLES = [
    torch.tensor([[3, 5, 7, 0], [2, 9, 0, 0]], dtype=torch.int32),
    torch.tensor([[1, 4, 0, 0], [6, 8, 0, 0]]).int(),
]


def kernel_table(table):
    """The same blocks, each as the kernel's four."""
    return (table[:, :, None] * (CACHE // KERNEL) + torch.arange(CACHE // KERNEL)).flatten(1)


def batches_v1():
    """The runner's own tables are in the kernel's blocks."""
    runner = attention_groups(KERNEL)
    blocks = [SimpleNamespace(block_size=KERNEL, get_device_tensor=lambda n, t=t: kernel_table(t)[:n]) for t in TABLES]
    runner.input_batch = SimpleNamespace(num_reqs=2, block_table=blocks)
    return BatchesV1(runner, Listener())


def batches_v2():
    """The runner's own tables are in the cache's blocks, and the attention groups map them."""
    runner = attention_groups(KERNEL)
    runner.block_tables = SimpleNamespace(block_sizes=[CACHE] * 2)
    runner.model_state = object.__new__(compat.DefaultModelState)
    batches = BatchesV2(runner, Listener())
    batches.arm(SimpleNamespace(num_reqs=2), TABLES)
    return batches


WHERE = geometry([3, 2], [70, 15])  # tokens 70 to 72 of one request, 15 and 16 of another


@pytest.mark.parametrize("make", [batches_v1, batches_v2])
@pytest.mark.parametrize("group", [0, 1])
def test_a_kernel_may_divide_the_blocks_of_the_cache(make, group):
    metadata, slots = PackedMetadata(make(), [str(n) for n in range(8)]).build(str(4 * group), WHERE, 6)
    first, second = TABLES[group].tolist()
    expected = [first[1] * CACHE + 6, first[1] * CACHE + 7, first[1] * CACHE + 8]
    expected += [second[0] * CACHE + 15, second[0] * CACHE + 16]
    assert slots.tolist() == [*expected, -1]
    table = metadata.common.block_table_tensor
    assert table.tolist() == kernel_table(TABLES[group])[:, : table.shape[1]].tolist()
    assert table.shape[1] >= 2 * CACHE // KERNEL
    assert metadata.builder.spec.block_size == KERNEL
    for token, slot in zip(WHERE.positions.tolist(), expected, strict=True):
        row = expected.index(slot) // 3
        assert int(table[row, token // KERNEL]) * KERNEL + token % KERNEL == slot, (
            "the kernel reads where it was written"
        )


class Batch(PackedBatch):
    """Cut at layers 2 and 5; each stage holds fewer tokens."""

    def __init__(self):
        """Without rows."""

    @property
    def cut_layers(self):
        return (2, 5)

    def geometry(self, layer):
        return geometry([1, 1], [70 - 10 * layer, 40 - 4 * layer])


@pytest.mark.parametrize("make", [batches_v1, batches_v2])
def test_layers_share_a_builder_only_where_they_share_metadata(make):
    names = [str(n) for n in range(8)]
    context = SimpleNamespace(
        attn_metadata=dict.fromkeys(names), slot_mapping=dict.fromkeys(names, torch.zeros(2, dtype=torch.long))
    )
    metadata = PackedMetadata(make(), names)
    with metadata.override(context, Batch()) as update:
        update()
        own = compat.get_forward_context()
        found = {name: own.attn_metadata[name] for name in names}
    assert [found[name] is None for name in names] == [True, True] + [False] * 6
    shared = [
        [name for name in names if found[name] is one] for one in {id(v): v for v in found.values() if v}.values()
    ]
    assert shared == [["2", "3"], ["4"], ["5", "6", "7"]], "by cut and by group of the cache"
    assert len({id(found[first].builder) for first, *_ in shared}) == 3
    for first, *_ in shared:
        cut = 5 if first == "5" else 2
        assert found[first].seq_lens.tolist() == [71 - 10 * cut, 41 - 4 * cut], "no other layer has overwritten it"


@pytest.mark.parametrize("mode", [None, "NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_graphs_leave_attention_out(mode):
    modes = compat.CUDAGraphMode
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(enable_chunked_prefill=True, long_prefill_token_threshold=0),
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        compilation_config=SimpleNamespace(cudagraph_mode=mode and modes[mode]),
        use_v2_model_runner=True,
    )
    register._adapt(config, config_of(CUT))
    assert config.compilation_config.cudagraph_mode == (modes.NONE if mode == "NONE" else modes.PIECEWISE)


@pytest.mark.parametrize("plan", ["fastav", GLOBAL["strided"]])
def test_steps_that_piecewise_graphs_pad_are_exact(omni, engines, monkeypatch, plan, steps):
    """vLLM runs them as PIECEWISE, padded to the next size that it would have captured; nothing is captured here."""
    llm = engines(omni.folder, plan, max_num_batched_tokens=256, max_num_seqs=8)
    runner, padded = llm.llm_engine.model_executor.driver_worker.worker.model_runner, []
    mode = compat.CUDAGraphMode.PIECEWISE

    def pad(tokens):
        padded.append(min(-(-tokens // 24) * 24, 256))
        return padded[-1]

    if RUNNER == "V2":
        from vllm.v1.worker.gpu import model_runner
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        def dispatch_v2(manager, num_reqs, num_tokens, *args, **kwargs):
            return BatchExecutionDescriptor(cg_mode=mode, num_tokens=pad(num_tokens), num_reqs=None), None

        monkeypatch.setattr(model_runner, "dispatch_cg_and_sync_dp", dispatch_v2)
    else:
        from vllm.forward_context import BatchDescriptor

        def dispatch(num_tokens, **kwargs):
            return mode, BatchDescriptor(num_tokens=pad(num_tokens))

        monkeypatch.setattr(runner.cudagraph_dispatcher, "dispatch", dispatch)
    agree(llm, omni, plan, QUESTIONS[:5])
    assert any(sum(tokens for _, tokens, _ in step) < size for step, size in zip(steps, padded, strict=True))


def test_cuts_and_metadata_wait_for_no_device(monkeypatch):
    """Tensors on `meta` have no values: whoever waits for one fails."""
    monkeypatch.setattr(attention_metadata, "upload", lambda array, device: torch.from_numpy(array).to(device))
    meta = torch.device("meta")
    state = PlanRuntime(config_of(CUT)).request_state(prompt(), meta)
    batch = PackedBatch([BatchRow(state, 0, len(IDS))], meta)
    hidden = batch.cut(LAYERS // 2, torch.empty(len(IDS), 8, device=meta))
    where = batch.geometry(LAYERS // 2)
    assert len(hidden) == where.seq_lens.sum() == state.prompt_kv_lens[-1]
    scored = PlanRuntime(config_of("fastav")).request_state(prompt(), meta)
    batch = PackedBatch([BatchRow(scored, 0, len(IDS))], meta)
    first = scored.runtime.cut_layers[0]
    for layer in range(first):
        if signals := batch.signals(layer):
            heads = torch.empty(len(IDS), 2, 8, device=meta)
            batch.observe(layer, signals, heads, heads, 1.0)
    assert len(batch.cut(first, torch.empty(len(IDS), 8, device=meta))) == scored.prompt_kv_lens[first]
    assert batch.remaining().device == meta
    batches = batches_v2()
    batches.arm(SimpleNamespace(num_reqs=2), [table.to(meta) for table in TABLES])
    batches._runner.device = meta
    metadata = PackedMetadata(batches, [str(n) for n in range(8)])
    metadata._builders["0"] = (lambda common: common), 0
    common, slots = metadata.build("0", WHERE, 6)
    assert (slots.device, common.seq_lens.device, len(slots)) == (meta, meta, 6)
    assert np.array_equal(common.seq_lens_cpu_upper_bound, WHERE.seq_lens)
