"""vLLM takes the flags that `fastav serve-config` prints."""

import json
from importlib import import_module

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastav.engines.vllm import guards, server_args
from fastav.engines.vllm.guards import PruningConfig
from fastav.engines.vllm.plugin.kv_groups import needs_no_prefixes
from fastav.pipelines import plan_named, resolve


@pytest.mark.parametrize("plan", ["fastav", "fastv@0.25", "random@0.5"])
def test_the_parser_takes_every_flag(plan):
    adapter, _, config = resolve("qwen2-5-omni")
    pruning = PruningConfig(plan=plan_named(plan, adapter), adapter=adapter, config=config)
    flags = server_args.flags(pruning, 4096)
    parser = make_arg_parser(FlexibleArgumentParser())
    taken = parser.parse_args([arg for flag in flags for arg in flag.args])
    assert taken.max_model_len == 4096
    assert taken.limit_mm_per_prompt == {"image": 0, "video": 1, "audio": 1}
    has_prefixes = needs_no_prefixes(pruning, chunked_prefill=True) is None
    assert taken.enable_prefix_caching is (None if has_prefixes else False)
    assert (taken.enable_chunked_prefill, taken.max_num_batched_tokens) == (None, None)
    assert json.loads(json.dumps(taken.additional_config)) == {"fastav": {"plan": server_args.plan_spec(pruning)}}
    assert (taken.worker_cls, taken.scheduler_cls) == (guards.WORKER, guards.SCHEDULER)
    assert taken.middleware == [guards.MIDDLEWARE]
    assert (taken.allowed_media_domains, taken.allowed_local_media_path) == ([server_args.NOWHERE], "")


def test_the_named_classes_are_there():
    for name in (guards.WORKER, guards.SCHEDULER, guards.MIDDLEWARE):
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(import_module(module), attribute))
