"""The middleware that adds what a plan kept to the usage of responses, without vLLM."""

import asyncio
import json

import pytest

from fastav.engines.vllm.plugin import middleware as module
from fastav.engines.vllm.plugin.middleware import UsageMiddleware
from fastav.engines.vllm.plugin.usage import PromptUsage, collect
from fastav.flops import Saving

USAGE = PromptUsage(
    plan="fastav",
    prompt_tokens={"text": 3, "audio": 4},
    tokens_per_layer=({"text": 3, "audio": 4}, {"text": 3, "media": 2}),
    flops=Saving(100, 60),
    kv_bytes=Saving(50, 40),
    kv_blocks=Saving(4, 3),
)
CHAT = "/v1/chat/completions"


def answer(monkeypatch, messages, prompts=(USAGE,), path=CHAT):
    """What a client gets of an application that sends these messages and takes these prompts."""
    monkeypatch.setattr(module, "require_plugin", lambda: None)
    sent = []

    async def app(scope, receive, send):
        for usage in prompts:
            await asyncio.create_task(_collect(usage))  # in a task of its own, as behind other middleware
        for message in messages:
            await send(message)

    async def _collect(usage):
        collect(usage)

    async def send(message):
        sent.append(message)

    asyncio.run(UsageMiddleware(app)({"type": "http", "path": path}, None, send))
    return sent


def response(kind, *bodies):
    size = sum(map(len, bodies))
    headers = [(b"content-type", kind), (b"content-length", str(size).encode()), (b"x-other", b"1")]
    start = {"type": "http.response.start", "status": 200, "headers": headers}
    rest = [
        {"type": "http.response.body", "body": body, "more_body": index < len(bodies) - 1}
        for index, body in enumerate(bodies)
    ]
    return [start, *rest]


def test_a_whole_response_has_the_usage_and_its_length(monkeypatch):
    body = json.dumps({"id": "x", "usage": {"prompt_tokens": 7}, "text": "ä"}, ensure_ascii=False).encode()
    start, sent = answer(monkeypatch, response(b"application/json", body[:10], body[10:]))
    assert json.loads(sent["body"]) == {
        "id": "x",
        "usage": {"prompt_tokens": 7, "fastav": USAGE.to_dict()},
        "text": "ä",
    }
    headers = dict(start["headers"])
    assert int(headers[b"content-length"]) == len(sent["body"])
    assert headers[b"x-other"] == b"1"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"application/json", b'{"error": {"message": "no"}}'),
        (b"application/json", b"[1]"),
        (b"application/json", b'{"usage": null}'),
        (b"text/plain", b"no JSON"),
    ],
)
def test_other_responses_are_as_they_were(monkeypatch, kind, body):
    messages = response(kind, body)
    start, *rest = answer(monkeypatch, messages)
    assert b"".join(message["body"] for message in rest) == body
    assert dict(start["headers"]) == dict(messages[0]["headers"])


def test_other_routes_and_requests_without_prompts_are_as_they_were(monkeypatch):
    body = b'{"usage": {"prompt_tokens": 7}}'
    messages = response(b"application/json", body)
    assert answer(monkeypatch, messages, path="/v1/models") == messages
    assert answer(monkeypatch, messages, prompts=())[1]["body"] == body


EVENTS = (
    b'data: {"choices":[{"delta":{"content":"\\"choices\\":[]"}}],"usage":{"prompt_tokens":7}}\n\n'
    b": ping\n\n"
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"text":"\xc3\xa4"}}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("size", [1, 7, 50, 1000])
def test_the_last_chunk_of_a_stream_has_it_however_the_stream_is_cut(monkeypatch, size):
    pieces = [EVENTS[at : at + size] for at in range(0, len(EVENTS), size)]
    start, *rest = answer(monkeypatch, response(b"text/event-stream; charset=utf-8", *pieces))
    assert start["type"] == "http.response.start"
    assert [message["more_body"] for message in rest] == [True] * (len(pieces) - 1) + [False]
    lines, given = b"".join(message["body"] for message in rest).split(b"\n"), EVENTS.split(b"\n")
    assert json.loads(lines[4][6:])["usage"] == {"prompt_tokens": 7, "text": "ä", "fastav": USAGE.to_dict()}
    assert lines[:4] + lines[5:] == given[:4] + given[5:]


def test_prompts_of_one_response_are_added(monkeypatch):
    body = b'{"usage": {}}'
    _, sent = answer(monkeypatch, response(b"application/json", body), prompts=(USAGE, USAGE))
    assert json.loads(sent["body"])["usage"]["fastav"] == {
        "plan": "fastav",
        "prompt_tokens": {"text": 6, "audio": 8},
        "tokens_per_layer": [{"text": 6, "audio": 8}, {"text": 6, "media": 4}],
        "flops": {"full": 200, "pruned": 120, "ratio": 0.6},
        "kv_bytes": {"full": 100, "pruned": 80, "ratio": 0.8},
        "kv_blocks": {"full": 8, "pruned": 6, "ratio": 0.75},
    }


def test_requests_at_the_same_time_have_usages_of_their_own(monkeypatch):
    monkeypatch.setattr(module, "require_plugin", lambda: None)

    async def app(scope, receive, send):
        for _ in range(scope["prompts"]):
            await asyncio.sleep(0)
            collect(USAGE)
        for message in response(b"application/json", b'{"usage": {}}'):
            await send(message)

    async def ask(prompts):
        sent = []

        async def send(message):
            sent.append(message)

        await UsageMiddleware(app)({"type": "http", "path": CHAT, "prompts": prompts}, None, send)
        return json.loads(sent[-1]["body"])["usage"]["fastav"]["prompt_tokens"]["text"]

    async def both():
        return await asyncio.gather(ask(1), ask(3))

    assert asyncio.run(both()) == [3, 9]
