"""What the server of `fastav serve` adds to a pipeline: `make bench-serve`.

Latency: in each round the same question about the same clip is asked of the pipeline itself, of the server that holds
this pipeline in the same process, and of the server with a stream, in turn; ratios are taken within a round. The clip
is one of the package, which the server knows by its name and the pipeline gets as bytes, so both decode it. Throughput:
answers a second of 1, 8 and 32 clients, who wait for an answer before they ask again, against questions asked of the
pipeline one after another. Page: seconds until the first byte of the page on a new connection. Models: the embedded
`tiny-long`, and one of its kind with 16 layers, 512 wide, whose weights are random.
"""

import argparse
import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastav
from fastav.bench import report
from fastav.bench.measure import Quartiles, rotated
from fastav.media import Clip
from fastav.pipelines import Pipeline
from fastav.serve.files import examples
from fastav.serve.server import ServerOptions, bound_socket, make_server

CLIP, QUESTION, NEW_TOKENS = "example-half-minute", "describe the clip.", 16
CLIENTS = (1, 8, 32)
WIDE = {
    "hidden_size": 512,
    "hidden_size_a": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "layer_types": ["full_attention"] * 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def small(plan: str) -> Pipeline:
    """A model of the kind of `tiny-long` that is larger and was never trained."""
    tiny: Any = fastav.pipeline("tiny-long", plan=plan).engine
    config = deepcopy(tiny.model.config)
    for name, value in WIDE.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = type(tiny.model)(config).eval()
    model.generation_config = tiny.model.generation_config
    return fastav.pipeline(model, plan, processor=tiny.processor)


MODELS: dict[str, Callable[[str], Pipeline]] = {
    "tiny-long": lambda plan: fastav.pipeline("tiny-long", plan=plan),
    "small": small,
}


@contextmanager
def running(pipe: Pipeline) -> Iterator[tuple[str, int]]:
    """Serve a pipeline in a thread; its host and port."""
    with bound_socket("127.0.0.1", 0) as listening:
        ready = threading.Event()
        server, _ = make_server(pipe, ServerOptions(name="model", port=0), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        host, port = listening.getsockname()
        thread.start()
        ready.wait()
        try:
            yield host, port
        finally:
            server.should_exit = True
            thread.join()


class Client:
    """A connection to the server, which asks the same question every time."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._connection = http.client.HTTPConnection(*address, timeout=600)

    def ask(self, *, stream: bool = False) -> tuple[str, float]:
        """The answer, and the seconds until its first text, or until all of it."""
        part = {"type": "file", "file": {"file_id": CLIP}}
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}],
            "max_tokens": NEW_TOKENS,
            "min_tokens": NEW_TOKENS,
            "temperature": 0,
            "stream": stream,
        }
        start, first, text = time.perf_counter(), None, ""
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        with self._connection.getresponse() as response:
            if not stream:
                answer = json.loads(response.read())
                return answer["choices"][0]["message"]["content"], time.perf_counter() - start
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                if piece := json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    first, text = first or time.perf_counter() - start, text + piece
        return text, first or 0.0

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


def direct(pipe: Pipeline) -> tuple[str, float]:
    """The answer of the pipeline, and the seconds until its first text."""
    start, seen = time.perf_counter(), []
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    clip = Clip.open(examples()[CLIP].file.data)
    answer = pipe(clip, QUESTION, on_text=lambda _: seen.append(time.perf_counter() - start), **settings)
    return answer.text, seen[0]


def latency(pipe: Pipeline, address: tuple[str, int], rounds: int) -> dict[str, Any]:
    """Seconds of an answer, alone and through the server."""
    client = Client(address)
    ways: dict[str, Callable[[], tuple[str, float]]] = {
        "pipeline": lambda: direct(pipe),
        "server": client.ask,
        "stream": lambda: client.ask(stream=True),
    }
    expected = [way()[0] for way in ways.values()]  # a warm-up
    assert len(set(expected)) == 1, f"the answers differ: {expected}"
    whole: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in rotated(list(ways), number):
            start = time.perf_counter()
            text, until_first = ways[name]()
            whole[name].append(time.perf_counter() - start)
            first[name].append(until_first)
            assert text == expected[0], "an answer differs"
    client.close()
    return {
        "rounds": rounds,
        "seconds": {name: asdict(Quartiles.of(values)) for name, values in whole.items()},
        "over_pipeline": {
            name: asdict(Quartiles.of_ratios(whole[name], whole["pipeline"])) for name in ("server", "stream")
        },
        "first_text_seconds": {name: asdict(Quartiles.of(first[name])) for name in ("pipeline", "stream")},
        "first_text_over_pipeline": asdict(Quartiles.of_ratios(first["stream"], first["pipeline"])),
    }


def throughput(pipe: Pipeline, address: tuple[str, int], answers: int) -> dict[str, Any]:
    """Answers a second of several clients at once, and of the pipeline."""
    start = time.perf_counter()
    for _ in range(answers):
        direct(pipe)
    found: dict[str, float] = {"pipeline": answers / (time.perf_counter() - start)}
    for clients in CLIENTS:
        each = -(-answers // clients)

        def work(_: int, each: int = each) -> None:
            client = Client(address)
            for _ in range(each):
                client.ask()
            client.close()

        with ThreadPoolExecutor(clients) as pool:
            start = time.perf_counter()
            list(pool.map(work, range(clients)))
            found[f"{clients} clients"] = clients * each / (time.perf_counter() - start)
    return {"answers": answers, "per_second": found}


def page(address: tuple[str, int], rounds: int = 50) -> Quartiles:
    """Seconds until the first byte of the page."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        connection = http.client.HTTPConnection(*address, timeout=60)
        connection.request("GET", "/")
        with connection.getresponse() as response:
            response.read(1)
            seconds.append(time.perf_counter() - start)
        connection.close()
    return Quartiles.of(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write `DIR/serve-cpu.json` if asked."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--plan", default="fastav", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--answers", type=int, default=32, help="for the throughput (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report")
    options = parser.parse_args(arguments)
    facts = report.circumstances(arguments, torch.device("cpu"), None, "benchmarks.serve")
    found: dict[str, Any] = {}
    load = [os.getloadavg()[0]]
    for name in options.models:
        pipe = MODELS[name](options.plan)
        with running(pipe) as address:
            found[name] = {"page_seconds": asdict(page(address))} | latency(pipe, address, options.rounds)
            found[name] |= throughput(pipe, address, options.answers)
        load.append(os.getloadavg()[0])
        print(name, *lines(found[name]), sep="\n")
    result = {**facts, "how": __doc__, "load_average": load, "plan": options.plan, "models": found}
    print(f"load average {', '.join(f'{one:.1f}' for one in load)}")
    if options.out is not None:
        report.write(result, options.out / "serve-cpu.json")
    return 0


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The numbers of one model, for reading."""
    yield f"  page: first byte after {report.milliseconds(found['page_seconds'])} ms"
    for name, seconds in found["seconds"].items():
        ratio = found["over_pipeline"].get(name)
        yield f"  {name:9} {report.milliseconds(seconds)} ms" + (f", {report.cell(ratio)} x" if ratio else "")
    firsts = found["first_text_seconds"]
    ratio = report.cell(found["first_text_over_pipeline"])
    yield f"  first text {report.milliseconds(firsts['stream'])} ms, {ratio} x the pipeline's"
    yield "  " + ", ".join(f"{name} {rate:.2f}/s" for name, rate in found["per_second"].items())


if __name__ == "__main__":
    sys.exit(main())
