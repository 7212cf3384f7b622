"""Messages between a server and its decoding processes: plain data and arrays, and nothing else."""

import json
import pickle
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from fastav.serve._wire import HEAD, Broken, Stack, encode, receive, send

MANY = {
    "plain": [None, True, 3, -(2**70), 0.1, float("inf"), "é\ud800", b"\0\xff", (), (1, ("a",)), [], {}, {1: {"a": 2}}],
    "arrays": [
        np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1],
        np.array(1.5),
        np.zeros((0, 3), np.float32),
        np.float32(2.5),
        np.array([True, False]),
        np.arange(10**6, dtype=np.float64),
    ],
    "tensors": [
        torch.arange(12).reshape(3, 4).T,
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.zeros(0, 5),
        torch.tensor([True, False]),
    ],
}


def _through(value: Any, **options: Any) -> Any:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        chunks = encode(value)
        thread = threading.Thread(target=_send_what_is_wanted, args=(ours, chunks))
        thread.start()
        try:
            return receive(theirs, **{"max_bytes": 2**30, **options})
        finally:
            theirs.close()
            thread.join()


def _send_what_is_wanted(connection: socket.socket, chunks: Any) -> None:
    with suppress(Broken):  # the other side closes when a message is too large
        send(connection, chunks)


def _raw(data: bytes) -> Any:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        ours.close()
        return receive(theirs, max_bytes=10**6)


def test_everything_comes_back_as_it_was() -> None:
    back = _through(MANY)
    assert back["plain"] == MANY["plain"]
    assert [type(one) for one in back["plain"]] == [type(one) for one in MANY["plain"]]
    for one, other in zip(back["arrays"], MANY["arrays"], strict=True):
        np.testing.assert_array_equal(one, other)
        assert (type(one), one.dtype, one.shape) == (type(other), other.dtype, other.shape)
    for one, other in zip(back["tensors"], MANY["tensors"], strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype


def test_a_stack_comes_back_as_one_array() -> None:
    pictures = [np.full((2, 3), number % 251, np.uint8) for number in range(3000)]
    np.testing.assert_array_equal(_through(Stack(pictures, (2, 3), "|u1")), np.stack(pictures))
    assert _through(Stack([], (2, 3), "|u1")).shape == (0, 2, 3)


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()]), np.array(["a"]), lambda: 0])
def test_other_objects_are_not_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        encode({"a": [value]})


def _message(tree: Any, *arrays: bytes) -> bytes:
    body = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    sizes = np.array([len(one) for one in arrays], "<u8").tobytes()
    return HEAD.pack(len(body), len(arrays)) + sizes + body + b"".join(arrays)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        _message([1])[:-1],
        _message(pickle.dumps([1])),
        _message({"array": [0, "|u1", [4]]}, b"abc"),
        _message({"array": [0, "|O", [1]]}, bytes(8)),
        _message({"array": [1, "|u1", [3]]}, b"abc"),
        _message({"array": [0, "<f4", [-1, 0]]}, b"abc"),
        _message({"tensor": [0, "load", [3]]}, b"abc"),
        _message({"eval": [0, "", []]}, b"abc"),
        _message({"a": 1, "b": 2}),
        _message({"dict": [[[1], 2]]}),
        _message(b"[" * 100_000),
        HEAD.pack(2**40, 0),
        HEAD.pack(2, 2**31),
        HEAD.pack(2, 1) + (2**62).to_bytes(8, "little") + b"[]",
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(Broken):
        _raw(data)


def test_a_message_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(Broken, match="too large"):
        _through(np.zeros(10**5), max_bytes=1000)


def test_sending_and_receiving_end_at_their_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            receive(theirs, max_bytes=10, until=start + 0.05)
        with pytest.raises(TimeoutError):
            send(ours, encode(np.zeros(10**7)), start + 0.1)
        with pytest.raises(TimeoutError):
            send(ours, encode(1), start)
        assert time.monotonic() - start < 5
