"""Many clients at once: no answer is lost or mixed up, none costs memory for good, and a killed server starts again."""

import ctypes
import gc
import http.client
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from support.serving import MODEL, serving, started

PLANS = ("fastav", "none", "fastav-plus", "fastv@0.5")
Case = dict[str, Any]


def case(content: Any, **fields: Any) -> Case:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 12} | fields


def cases() -> list[Case]:
    """Requests that differ in plan, settings and media; their answers do not depend on chance."""
    texts = [case(f"what is {number}?", min_tokens=4 + number, fastav=plan) for number, plan in enumerate(PLANS)]
    texts += [case("hello", temperature=1.3, seed=seed, min_tokens=6) for seed in range(2)]
    texts += [case("hello", min_tokens=8, n=2), case("hello", min_tokens=8, stop=["e"])]
    clips = [
        case([{"type": "file", "file": {"file_id": name}}, {"type": "text", "text": "describe the clip."}], fastav=plan)
        for name, plan in zip(("example-triangle", "example-knock"), PLANS, strict=False)
    ]
    return [*texts * 4, *clips]


@dataclass
class Load:
    """Requests to one server from many clients.

    expected: the texts of each case, as the server gave them alone. wrong: what differed. retries: answers 429.
    """

    host: str
    port: int
    cases: Sequence[Case]
    expected: list[list[str]] = field(default_factory=list)
    wrong: list[Any] = field(default_factory=list)
    answered: int = 0
    left: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def serially(self) -> list[list[str]]:
        """The answers to all cases, one after another."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        known: dict[str, list[str]] = {}
        for one in self.cases:
            key = json.dumps(one)
            known[key] = known.get(key) or self._texts(self._send(connection, one), False)
        connection.close()
        return [known[json.dumps(one)] for one in self.cases]

    def run(self, requests: int, clients: int) -> None:
        """Send so many requests; a tenth of the clients' requests are given up early, and are not counted."""
        numbers = iter(range(requests))
        threads = [threading.Thread(target=self._client, args=(seed, numbers)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, seed: int, numbers: Any) -> None:
        make = random.Random(seed)
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        while True:
            with self.lock:
                if next(numbers, None) is None:
                    break
            number, stream = make.randrange(len(self.cases)), make.random() < 0.5
            if make.random() < 0.1:
                self._leave(self.cases[number] | {"stream": stream}, make.random() * 0.3)
            try:
                found = self._texts(self._send(connection, self.cases[number] | {"stream": stream}), stream)
            except Exception as error:
                found = [repr(error)]
                connection.close()
            with self.lock:
                self.answered += 1
                if found != self.expected[number]:
                    self.wrong.append((self.cases[number], stream, found, self.expected[number]))
        connection.close()

    def _leave(self, body: Case, seconds: float) -> None:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        time.sleep(seconds)
        connection.close()
        with self.lock:
            self.left += 1

    def _send(self, connection: http.client.HTTPConnection, body: Case) -> bytes:
        for _ in range(200):
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                data = response.read()
            if response.status == 200:
                return data
            assert response.status == 429, data
            assert int(response.headers["Retry-After"]) > 0
            time.sleep(0.2)
        raise AssertionError("the queue is always full")

    @staticmethod
    def _texts(data: bytes, stream: bool) -> list[str]:
        if not stream:
            return [choice["message"]["content"] for choice in json.loads(data)["choices"]]
        events = [event.removeprefix("data: ") for event in data.decode().split("\n\n")]
        assert events[-2:] == ["[DONE]", ""]
        found: dict[int, str] = {}
        for choice in itertools.chain.from_iterable(json.loads(event)["choices"] for event in events[:-2]):
            found[choice["index"]] = found.get(choice["index"], "") + (choice["delta"].get("content") or "")
        return [found[index] for index in sorted(found)]


def load_on(url: str) -> Load:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return Load(host=host, port=int(port), cases=cases())


def metric(load: Load, name: str) -> float:
    connection = http.client.HTTPConnection(load.host, load.port, timeout=20)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def check_rests(load: Load) -> None:
    end = time.monotonic() + 20
    while metric(load, "fastav_answers_admitted") or metric(load, "fastav_answers_waiting"):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_many_clients():
    with started() as (_, url):
        load = load_on(url)
        load.expected = load.serially()
        load.run(100, clients=16)
        assert load.wrong == []
        assert load.answered == 100
        check_rests(load)


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


def in_use() -> int:
    """Bytes that this process has allocated and not freed; resident memory also has what glibc keeps for threads."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc")
def test_a_thousand_requests_leave_no_memory_behind():
    with serving() as server:
        load = load_on(server.url)
        load.expected = load.serially()
        sizes = []
        for _ in range(5):  # the first round fills what is kept from then on
            load.run(250, clients=32)
            check_rests(load)
            sizes.append(in_use())
        assert load.wrong == []
        assert sizes[4] < sizes[0] + 2e6, sizes


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_thousand_requests_and_a_kill():
    with started() as (process, url):
        load = load_on(url)
        load.expected = load.serially()
        load.run(1000, clients=32)
        check_rests(load)
        assert load.wrong == []
        assert load.answered == 1000
        assert load.left > 50
        running = threading.Thread(target=load.run, args=(64, 32))
        running.start()
        time.sleep(2)
        os.kill(process.pid, signal.SIGKILL)
        running.join()
        process.wait(20)
    with started(port=load.port):
        again = load_on(url)
        assert again.serially() == load.expected
        again.expected = load.expected
        again.run(64, clients=32)
        assert again.wrong == []
