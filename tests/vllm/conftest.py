"""vLLM stands in an environment of its own, which `make vllm-test` builds; elsewhere these tests are skipped."""

import gc
import os
from importlib.util import find_spec

import pytest

THERE = (found := find_spec("vllm")) is not None and found.origin is not None  # not the folder of these tests
if THERE:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where tests can look at it
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # several workers on the cores that there are
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_ignore_collect(collection_path):
    return True if not THERE and collection_path.name.startswith("test_vllm_") else None


@pytest.fixture(scope="session")
def engines():
    import vllm.v1.engine.core
    from harness import Engines

    # each engine looks through all objects for garbage many times: what is imported is left out of that, and what an
    # engine makes is not, so that it goes with the engine; the groups of ranks are those of all engines here, so that
    # they go with the last
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm.v1.engine.core, "freeze_gc_heap", lambda: None)
        patch.setattr(vllm.v1.engine.core, "cleanup_dist_env_and_memory", gc.collect)
        gc.collect()
        gc.freeze()
        made = Engines()
        yield made
        made.close()


@pytest.fixture(scope="session")
def omni(tmp_path_factory):
    import checkpoints
    from harness import Reference

    return Reference("qwen2-5-omni", checkpoints.omni(tmp_path_factory.mktemp("omni")))


@pytest.fixture(scope="session")
def sight(tmp_path_factory):
    import checkpoints
    from harness import Reference

    return Reference("qwen2-5-vl", checkpoints.sight(tmp_path_factory.mktemp("sight")))


@pytest.fixture(scope="session")
def omni3(tmp_path_factory):
    import checkpoints
    from harness import Reference

    return Reference("qwen3-omni", checkpoints.omni3(tmp_path_factory.mktemp("omni3")))


@pytest.fixture(scope="session", params=["sight3", "sight3_moe"])
def sight3(request, tmp_path_factory):
    import checkpoints
    from harness import Reference

    return Reference("qwen3-vl", getattr(checkpoints, request.param)(tmp_path_factory.mktemp(request.param)))


@pytest.fixture
def steps(monkeypatch):
    """The steps of the engine: of every request (tokens computed before, tokens, whether cuts may drop them)."""
    from fastav.engines.vllm.plugin import decoder

    seen = []

    class RecordedBatch(decoder.PackedBatch):
        def __init__(self, rows, device):
            seen.append([(row.num_computed, row.num_tokens, row.is_cut) for row in rows])
            super().__init__(rows, device)

    monkeypatch.setattr(decoder, "PackedBatch", RecordedBatch)
    return seen
