"""A plan that does not take effect inside vLLM ends the engine with an error, wherever it was lost."""

from contextlib import nullcontext

import pytest
from harness import ask, sampling
from test_vllm_exact import GLOBAL, QUESTIONS

from fastav.errors import PlanNotApplied

ASKED = QUESTIONS[:4]


def decoder_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model().language_model.model


def unhook(llm, monkeypatch):
    """vLLM runs its decoder in another way than by calling it."""
    monkeypatch.setattr(decoder_of(llm), "__class__", type(decoder_of(llm)).__mro__[1])


def unpack(llm, monkeypatch):
    """Cuts leave all tokens."""
    from fastav.engines.vllm.plugin.packed_batch import BatchRow

    monkeypatch.setattr(BatchRow, "cut", lambda self, layer, hidden: hidden)


def unpack_last(llm, monkeypatch):
    """The last cut leaves all tokens."""
    from fastav.engines.vllm.plugin.packed_batch import BatchRow

    cut = BatchRow.cut
    last = len(decoder_of(llm).layers) - 1
    monkeypatch.setattr(
        BatchRow, "cut", lambda self, layer, hidden: hidden if layer == last else cut(self, layer, hidden)
    )


def override_nothing(llm, monkeypatch):
    """Layers read where their tokens are from somewhere else than the forward context."""
    from fastav.engines.vllm.plugin.attention_metadata import PackedMetadata

    monkeypatch.setattr(PackedMetadata, "override", lambda *_: nullcontext(lambda *_: None))


def keep_slots(llm, monkeypatch):
    """Layers read from somewhere else to which slots of the cache their keys go."""
    from fastav.engines.vllm.plugin.attention_metadata import PackedMetadata

    build = PackedMetadata.build

    def halved(self, layer_name, where, width):
        metadata, slots = build(self, layer_name, where, width)
        return metadata, slots[: len(slots) // 2]

    monkeypatch.setattr(PackedMetadata, "build", halved)


@pytest.mark.parametrize(
    ("plan", "lose", "words"),
    [
        ("fastav", unhook, r"layer 4's attention metadata has \d+ tokens, and by the plan"),
        (GLOBAL["strided"], unhook, r"layer 0's attention metadata has \d+ tokens, and by the plan"),
        ("fastav", unpack, r"layer 4's attention metadata has"),
        ("fastav", unpack_last, r"layer 7's attention metadata has"),
        ("fastav", override_nothing, r"layer 4 expects \d+ tokens and gets"),
        ("fastav", keep_slots, r"layer 4's cache was given \d+ tokens"),
    ],
)
def test_a_cut_that_vanishes_is_an_error(omni, engines, monkeypatch, plan, lose, words):
    with engines.own(omni.folder, plan, enable_chunked_prefill=False) as llm:
        lose(llm, monkeypatch)
        with pytest.raises(PlanNotApplied, match=f"the plan did not take effect: {words}"):
            ask(llm, ASKED)


def test_a_cut_that_answers_forget_is_an_error(omni, engines, monkeypatch):
    with engines.own(omni.folder, "fastav", enable_prefix_caching=False) as llm:
        engine = llm.llm_engine
        engine.add_request("0", ASKED[0].for_vllm(), sampling(4))
        engine.step()
        unhook(llm, monkeypatch)  # from now on each layer is told that it holds the whole prompt
        with pytest.raises(PlanNotApplied, match=r"layer 4's cache holds \d+ tokens of one request, and by the plan"):
            engine.step()


@pytest.mark.parametrize("budget", [32, 256])
def test_a_late_cut_that_vanishes_is_an_error(omni, engines, monkeypatch, budget):
    from fastav.pruning.state import PruningState

    with engines.own(omni.folder, "fastav", max_num_batched_tokens=budget, max_num_seqs=8) as llm:
        monkeypatch.setattr(PruningState, "cut", lambda self, layer, hidden: hidden)
        with pytest.raises(
            PlanNotApplied, match=r"the plan did not take effect: layer 4 gets \d+ tokens, and by the plan"
        ):
            ask(llm, ASKED)


def test_a_late_slice_that_does_not_run_is_an_error(omni, engines, monkeypatch):
    with engines.own(omni.folder, "fastav", max_num_batched_tokens=32, max_num_seqs=8) as llm:
        monkeypatch.setattr("fastav.engines.vllm.plugin.late_layers.LateLayers.run", lambda *_: None)
        with pytest.raises(PlanNotApplied, match=r"layer 4's attention ran \d times, and by the plan \d"):
            ask(llm, ASKED)


def test_a_group_of_the_cache_with_other_blocks_is_an_error(omni, engines, monkeypatch):
    from fastav.engines.vllm.plugin.kv_cache import KVGroupManager

    monkeypatch.setattr(KVGroupManager, "_slots", lambda self, request, tokens: tokens)
    with (
        engines.own(omni.folder, "fastav") as llm,
        pytest.raises(PlanNotApplied, match=r"layer \d has \d+ blocks for a request"),
    ):
        ask(llm, ASKED)


def test_where_nothing_is_lost_nothing_is_said(omni, engines):
    shared = engines(omni.folder, "fastav")
    with engines.own(omni.folder, "fastav"):
        pass  # whose end must not take away what the other runs on
    assert len(ask(shared, ASKED)) == len(ASKED)
