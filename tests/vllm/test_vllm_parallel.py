"""Two ranks on a CPU, each with half of the heads: they say what one says, and keep the same tokens."""

import pytest
from test_vllm_exact import ASKING, GLOBAL, QUESTIONS, agree


@pytest.mark.parametrize("plan", [GLOBAL["position"], "fastav", "fastav-plus", "dart", ASKING])
def test_two_ranks_are_exact(omni, plan):
    agree(omni, plan, QUESTIONS, tensor_parallel_size=2)
