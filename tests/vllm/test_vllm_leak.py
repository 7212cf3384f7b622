"""A thousand requests leave nothing behind in an engine: no block of the cache, no state of a request, no memory."""

import gc
import resource
from pathlib import Path

import numpy as np
import pytest
from harness import AUDIO, VIDEO, Question, film, sampling, sound
from test_vllm_exact import GLOBAL
from vllm.sampling_params import RequestOutputKind

REQUESTS, AT_ONCE, LOOK = 1000, 6, 20  # how many, how many at once, and after how many memory is looked at
WARM = 300  # requests after which memory no longer grows by what is filled once
LEAK = 8 << 10  # bytes a request: a prompt's features or the state of one would take more

KINDS = [
    Question(text="only text", new=3),
    Question(text=f"x {AUDIO} tell", audio=sound(1, 1), new=3),
    Question(text=f"with its own sound {VIDEO} what is it?", video=film(2, 2), audio=sound(2, 3), together=True, new=4),
    Question(text=f"hear {AUDIO} and see {VIDEO}", video=film(2, 4), audio=sound(1, 5), new=3),
]


class Crowd:
    """Requests of one engine, some at once: every fifth is aborted, half are told of token by token."""

    def __init__(self, engine):
        self.engine = engine
        self.running = {}  # by name: steps that are left before it is aborted, if it is
        self.tokens = {}
        self.finished = self.aborted = 0

    def add(self, number):
        question, doomed = KINDS[number % len(KINDS)], number % 5 == 4
        kind = RequestOutputKind.DELTA if number % 2 else RequestOutputKind.FINAL_ONLY
        new = 40 if doomed else question.new
        params = sampling(new, output_kind=kind, logprobs=None)
        self.engine.add_request(str(number), question.for_vllm(), params)
        # some are gone before they begin, some in the middle of their answer
        self.running[str(number)] = (number // 5) % 6 if doomed else None
        self.tokens[str(number)] = -new

    def step(self):
        for name in [name for name, left in self.running.items() if left == 0]:
            self.engine.abort_request([name])
            self.aborted += 1
            del self.running[name], self.tokens[name]
        self.running = {name: left and left - 1 for name, left in self.running.items()}
        for output in self.engine.step():
            self.tokens[output.request_id] += len(output.outputs[0].token_ids)
            if output.finished:
                self.finished += 1
                del self.running[output.request_id]
                assert self.tokens.pop(output.request_id) == 0, "as many tokens as were asked for"


def resident():
    """Bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize(
    "plan", ["fastav", pytest.param(GLOBAL["strided"], marks=pytest.mark.slow)], ids=["fine", "global"]
)
def test_a_thousand_requests_leave_nothing(omni, engines, plan, capsys):
    with engines.own(omni.folder, plan, max_num_seqs=AT_ONCE) as llm:
        engine = llm.llm_engine
        core = engine.engine_core.engine_core
        pool = core.scheduler.kv_cache_manager.block_pool
        pruner = engine.model_executor.driver_worker.worker.model_runner.get_model().language_model.model.pruner
        free, crowd, memory = pool.get_num_free_blocks(), Crowd(engine), []
        for number in range(REQUESTS):
            while len(crowd.running) >= AT_ONCE:
                crowd.step()
            crowd.add(number)
            if number % LOOK == 0:
                memory.append(resident())
        while crowd.running:
            crowd.step()
        # what a worker knows of a request goes when it next runs another
        crowd.add(0)
        while crowd.running:
            crowd.step()
        assert crowd.finished + crowd.aborted == REQUESTS + 1
        assert crowd.aborted == REQUESTS // 5
        assert pool.get_num_free_blocks() == free
        assert pool.get_usage() == 0
        assert not engine.has_unfinished_requests()
        assert len(pruner.request_states) <= 1, "the last one that ran"
    at = np.arange(len(memory)) * LOOK
    late = at >= WARM
    slope = np.polyfit(at[late], np.asarray(memory)[late], 1)[0]
    with capsys.disabled():
        print(
            f"\n{REQUESTS} requests, {crowd.aborted} aborted: memory {memory[0] >> 20} MiB at first, "
            f"{memory[-1] >> 20} MiB at last, {slope:+.0f} bytes a request after {WARM}"
        )
    assert slope < LEAK
