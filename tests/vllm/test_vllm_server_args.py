"""vLLM takes the flags that `fastav serve-config` prints."""

import json

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastav.engines.vllm import server_args
from fastav.engines.vllm.guards import PruningConfig
from fastav.pipelines import plan_named, resolve


@pytest.mark.parametrize("plan", ["fastav", "fastv@0.25", "random@0.5"])
def test_the_parser_takes_every_flag(plan):
    adapter, _, config = resolve("qwen2-5-omni")
    pruning = PruningConfig(plan=plan_named(plan, adapter), adapter=adapter, config=config)
    flags = server_args.flags(pruning, 4096)
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    taken = parser.parse_args([arg for flag in flags for arg in flag.args])
    assert taken.max_model_len == 4096
    assert taken.limit_mm_per_prompt == {"image": 0, "video": 1, "audio": 1}
    assert taken.enable_prefix_caching is False
    assert taken.enable_chunked_prefill is (None if pruning.compiled.layout_only else False)
    assert taken.max_num_batched_tokens == (None if pruning.compiled.layout_only else 4096)
    assert json.loads(json.dumps(taken.additional_config)) == {"fastav": {"plan": server_args.plan_spec(pruning)}}
