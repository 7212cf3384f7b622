"""Communication of tensor-parallel ranks, as threads that meet at a barrier in place of vLLM's processes."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from fastav.engines.vllm.plugin.tensor_parallel import TensorParallel
from fastav.pruning.attention import last_query_attention

TOKENS, WIDTH, HEADS = 7, 4, 8


class Meeting:
    """Collects one object of every rank, in their order."""

    def __init__(self, size):
        self.size, self.barrier, self.brought = size, Barrier(size, timeout=30), [None] * size

    def all(self, rank, given):
        self.brought[rank] = given
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found


class Group:
    """One rank's view of a meeting, with the methods of vLLM's groups."""

    def __init__(self, meeting, rank):
        self.meeting, self.rank, self.world_size = meeting, rank, meeting.size

    def all_reduce(self, given):
        return sum(self.meeting.all(self.rank, given))

    def all_gather(self, given, dim):
        return torch.cat(self.meeting.all(self.rank, given), dim)

    def broadcast(self, given, source):
        return self.meeting.all(self.rank, given)[source]


def on_all(size, work):
    """The result of every rank."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(TensorParallel(Group(meeting, rank)), rank), range(size)))


def heads_of(whole, size, rank):
    """A rank's heads, [tokens, heads, features]; where there are fewer than ranks, neighbours have the same."""
    mine = max(1, whole.shape[1] // size)
    first = rank * whole.shape[1] // size
    return whole[:, first : first + mine]


def row(query, key):
    q, k = (x.transpose(0, 1)[None] for x in (query, key))
    return last_query_attention(q, k, None, None, 0.5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_compute_what_one_computes(size, kv_heads):
    make = torch.Generator().manual_seed(0)
    query = torch.randn(TOKENS, HEADS, WIDTH, generator=make)
    key = torch.randn(TOKENS, kv_heads, WIDTH, generator=make)

    def work(ranks, rank):
        q, k = heads_of(query, size, rank), heads_of(key, size, rank)
        return ranks.mean(row(q, k)), ranks.gather_heads(q, HEADS), ranks.gather_heads(k, kv_heads)

    for mean, queries, keys in on_all(size, work):
        assert torch.equal(queries, query)
        assert torch.equal(keys, key)
        assert torch.allclose(mean, row(query, key), atol=1e-6)


def test_all_ranks_keep_the_tokens_of_the_first():
    chosen = on_all(3, lambda ranks, rank: ranks.broadcast_indices(torch.tensor([[rank, rank + 1]])))
    assert all(torch.equal(one, torch.tensor([[0, 1]])) for one in chosen)


@pytest.mark.parametrize("group", [None, Group(Meeting(1), 0)])
def test_a_single_rank_sends_nothing(group):
    given, ranks = torch.randn(3, 2, 4), TensorParallel(group)
    assert ranks.is_single
    assert ranks.gather_heads(given, 2) is given
    scores, chosen = torch.rand(1, 4), torch.tensor([[1, 2]])
    assert ranks.mean(scores) is scores
    assert ranks.broadcast_indices(chosen) is chosen
