"""Two ranks on a CPU, each with half of the heads: they say what one says, and keep the same tokens."""

import re
import subprocess
import sys

import pytest
import test_vllm_qwen3
from harness import agree
from test_vllm_exact import ASKING, BOTH, GLOBAL, QUESTIONS

from fastav.plan import Plan, Step

EVERYTHING = Plan((*ASKING.steps, Step(layers="5", method="dart", keep=BOTH)))  # keys too


@pytest.mark.parametrize("plan", [GLOBAL["position"], "fastav", "fastav-plus", EVERYTHING])
def test_two_ranks_are_exact(omni, engines, plan):
    agree(engines(omni.folder, "fastav", tensor_parallel_size=2), omni, plan, QUESTIONS)


def test_two_ranks_share_a_key_head_and_divide_experts(omni3, engines):
    agree(engines(omni3.folder, EVERYTHING, tensor_parallel_size=2), omni3, EVERYTHING, test_vllm_qwen3.QUESTIONS)


def test_what_a_worker_refuses_is_heard(sight):
    plan = {"fastav": {"plan": "fastav"}}
    options = {
        "tensor_parallel_size": 2,
        "model_impl": "transformers",
        "additional_config": plan,
        "enforce_eager": True,
    }
    options |= {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 64 << 20, "skip_mm_profiling": True}
    command = [sys.executable, "-c", f"from vllm import LLM; LLM({str(sight.folder)!r}, **{options!r})"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 1
    last = [line for line in process.stderr.splitlines() if line.startswith("RuntimeError: ")][-1]
    assert re.search("runs qwen2-5-vl as .*, whose decoder is not known", last)
