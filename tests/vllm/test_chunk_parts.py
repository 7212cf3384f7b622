"""The parts of prefills in chunks that need no vLLM: the schedule of late steps, and the memory of held states."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastav.engines.vllm.plugin.held_states import BlockStore, HeldPages, TensorStore
from fastav.engines.vllm.plugin.late_schedule import LateSchedule, Stage, late_steps
from fastav.errors import UnsupportedPlan


@st.composite
def stages_of_late_layers(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    lens = sorted(draw(st.lists(st.integers(1, 300), min_size=len(sizes), max_size=len(sizes))), reverse=True)
    ends = np.cumsum([draw(st.integers(0, 4)), *sizes]).tolist()
    return tuple(Stage(first, end, n) for first, end, n in zip(ends[:-1], ends[1:], lens, strict=True))


@given(stages_of_late_layers(), st.integers(1, 64), st.integers(1, 40))
def test_slices_cover_every_stage_in_order_within_the_budget(stages, max_tokens, max_steps):
    steps = late_steps(stages, max_tokens, max_steps)
    assert 1 <= len(steps) <= max_steps
    slices = [one for step in steps for one in step]
    assert slices == sorted(slices)
    for index, stage in enumerate(stages):
        own = [one for one in slices if one.stage == index]
        assert [one.start for one in own] == [0, *(one.end for one in own[:-1])]
        assert own[-1].end == stage.num_tokens
        assert all(one.start < one.end for one in own)
    layers = [stage.end_layer - stage.first_layer for stage in stages]
    total = sum(n * stage.num_tokens for n, stage in zip(layers, stages, strict=True))
    costs = [sum(layers[one.stage] * (one.end - one.start) for one in step) for step in steps]
    if max(costs) > max_tokens * sum(layers):  # only where so few steps would not do otherwise
        assert len(late_steps(stages, max_tokens, 10**6)) > max_steps
        assert max(costs) <= -(-total // max_steps) + (len(steps) + 2) * sum(layers)
    else:
        assert all(one.end - one.start <= max_tokens for one in slices)


@st.composite
def schedules(draw):
    prompt_len, held_layer = draw(st.integers(2, 120)), draw(st.integers(0, 3))
    entering = np.array([*draw(st.lists(st.booleans(), min_size=prompt_len - 1, max_size=prompt_len - 1)), True])
    held_lens = np.concatenate([[0], np.cumsum(entering)])
    lens = [prompt_len] * held_layer
    late = sorted(draw(st.lists(st.integers(1, int(held_lens[-1])), min_size=1, max_size=5)), reverse=True)
    cuts = [held_layer + index for index in range(len(late))]
    return LateSchedule.of(
        held_lens,
        [*lens, *late],
        cuts,
        max_tokens=draw(st.integers(1, 40)),
        max_steps=draw(st.integers(1, prompt_len)),
    )


@given(schedules(), st.data())
def test_whatever_room_there_is_every_layer_runs_its_tokens_once(schedule, data):
    computed, early, late, waits = 0, 0, 0, 0
    ran = dict.fromkeys(range(len(schedule.stages)), 0)
    while computed < schedule.prompt_len:
        room, may_run_late = data.draw(st.integers(1, 60)), data.draw(st.booleans())
        if waits > 3:
            room, may_run_late = schedule.prompt_len, True
        tokens = schedule.limit(computed, room, late=may_run_late)
        assert 0 <= tokens <= min(room, schedule.prompt_len - computed)
        waits = 0 if tokens else waits + 1
        new_early = schedule.num_early(computed + tokens) - schedule.num_early(computed)
        assert 0 <= new_early <= room
        slices = schedule.slices(computed, tokens)
        assert may_run_late or not slices
        assert not slices or schedule.num_early(computed + tokens) == schedule.prompt_len
        assert schedule.num_late_steps(computed + tokens) - late <= 1
        for one in slices:
            assert ran[one.stage] == one.start
            ran[one.stage] = one.end
        computed, early, late = computed + tokens, early + new_early, schedule.num_late_steps(computed + tokens)
        for index, stage in enumerate(schedule.stages):
            assert schedule.late_len(stage.first_layer, computed) == ran[index]
            assert schedule.late_len(stage.end_layer - 1, computed) == ran[index]
        assert schedule.num_prompt_blocks(computed, 16) >= -(-int(schedule.held_lens[early]) // 16)
        if schedule.buffer_len and slices and computed < schedule.prompt_len:
            assert schedule.num_buffer_blocks(computed, 16) * 16 >= max(ran.values())
    assert early == schedule.prompt_len
    assert late == len(schedule.steps)
    assert list(ran.values()) == [stage.num_tokens for stage in schedule.stages]


def caches(blocks, kv_heads, block_size, content, permuted=(0, 1, 2, 3), padded=0):
    """Views of a cache as backends have them: [blocks, heads, tokens, content], in any order of memory."""
    sizes = (blocks, kv_heads, block_size, content)
    shape = [sizes[axis] for axis in permuted]
    memory = torch.zeros(2, shape[0], int(np.prod(shape[1:])) + padded)
    inverse = [permuted.index(axis) for axis in range(4)]
    return [part[:, : int(np.prod(shape[1:]))].unflatten(1, shape[1:]).permute(inverse) for part in memory]


@pytest.mark.parametrize("permuted", [(0, 1, 2, 3), (0, 2, 1, 3)])
@pytest.mark.parametrize("padded", [0, 8])
def test_states_in_blocks_are_those_that_were_written(permuted, padded):
    generator = torch.Generator().manual_seed(0)
    like, key_features, block_size = torch.zeros(11), 4, 8
    parts = caches(6, 2, block_size, 4, permuted, padded)  # two caches of 8 numbers a token for 15
    pages = HeldPages(list(enumerate(parts)), block_size=block_size, features=8, key_features=key_features, like=like)
    block, tensor = BlockStore(pages), TensorStore(20, torch.zeros(1, 11), key_features)
    block.enter_step({0: torch.tensor([4, 1, 3, 0]), 1: torch.tensor([2, 5, 0, 0])})
    for start, count, has_hidden, has_keys in [(0, 5, 1, 1), (5, 9, 1, 1), (14, 6, 1, 1), (3, 4, 1, 0), (6, 4, 0, 1)]:
        hidden = torch.randn(count, 11, generator=generator)
        keys = torch.randn(count, key_features, generator=generator)
        for store in (block, tensor):
            if has_keys:
                store.write_keys(start, keys)
            if has_hidden:
                store.write(start, hidden)
    indices = torch.tensor([19, 0, 7, 7, 12])
    assert torch.equal(block.hidden(indices), tensor.hidden(indices))
    assert torch.equal(block.keys(20), tensor.keys(20))
    assert torch.equal(block.keys(3), tensor.keys(3))


def test_blocks_of_a_kernel_may_be_smaller_than_those_of_the_cache():
    pages = HeldPages([(0, torch.zeros(12, 2, 4, 8))], block_size=8, features=16, key_features=4, like=torch.zeros(12))
    assert pages.pages[0].states.shape == (6, 8, 16)


def test_blocks_that_are_in_several_places_are_refused():
    memory = torch.zeros(2, 6, 8, 4).permute(1, 0, 2, 3)  # heads before blocks
    with pytest.raises(UnsupportedPlan, match="several places"):
        HeldPages([(0, memory)], block_size=8, features=8, key_features=2, like=torch.zeros(6))


def test_a_cache_of_another_dtype_holds_states_in_as_many_bytes():
    cache = torch.zeros(4, 2, 8, 32, dtype=torch.uint8)  # FP8: 64 bytes a token
    pages = HeldPages(
        [(0, cache)], block_size=8, features=32, key_features=4, like=torch.zeros(28, dtype=torch.bfloat16)
    )
    store = BlockStore(pages)
    store.enter_step({0: torch.tensor([2, 1])})
    hidden, keys = torch.randn(11, 28).bfloat16(), torch.randn(11, 4).bfloat16()
    store.write(0, hidden)
    store.write_keys(0, keys)
    assert torch.equal(store.hidden(torch.arange(11)), hidden)
    assert torch.equal(store.keys(11), keys)
