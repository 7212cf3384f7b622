"""Plain data and arrays, sent over a socket between a server and its decoding processes.

What a decoding process sends is not trusted. A message is JSON, followed by the bytes of its arrays, so that reading it
makes None, numbers, texts, bytes, lists, tuples, dicts, arrays and tensors, and nothing else.
"""

import json
import socket
import struct
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import numpy as np
import torch

HEAD = struct.Struct("<QI")
"""Number of bytes of the JSON, and number of arrays."""

MAX_JSON = 2**26
"""Bytes of the JSON of a message."""

MAX_ARRAYS = 100_000
AT_ONCE = 256
"""Buffers that are given to the system in one call."""

Chunks = list[memoryview]


class Stack:
    """Arrays of one shape and type, which are sent as one array without being copied together."""

    def __init__(self, arrays: Sequence[np.ndarray], shape: tuple[int, ...], dtype: str) -> None:
        self.arrays, self.shape, self.dtype = arrays, (len(arrays), *shape), dtype


class Broken(Exception):
    """The other side has ended, or sent what it must not send."""


def encode(value: Any) -> Chunks:
    """The bytes that stand for a value.  Raises: TypeError for anything but plain data, arrays and tensors."""
    arrays: list[Chunks] = []
    body = json.dumps(_flat(value, arrays), separators=(",", ":")).encode()
    sizes = struct.pack(f"<{len(arrays)}Q", *(sum(chunk.nbytes for chunk in chunks) for chunks in arrays))
    head = HEAD.pack(len(body), len(arrays)) + sizes + body
    return [memoryview(head), *(chunk for chunks in arrays for chunk in chunks if chunk.nbytes)]


def send(connection: socket.socket, chunks: Chunks, until: float | None = None) -> None:
    """Send what `encode` gave.  until: on the monotonic clock.  Raises: TimeoutError, Broken."""
    pending = list(chunks)
    pending.reverse()
    try:
        while pending:
            connection.settimeout(_left(until))
            sent = connection.sendmsg(pending[: -AT_ONCE - 1 : -1])
            while pending and sent >= pending[-1].nbytes:
                sent -= pending.pop().nbytes
            if sent:
                pending[-1] = pending[-1][sent:]
    except TimeoutError:
        raise
    except OSError as error:
        raise Broken(str(error)) from error


def receive(connection: socket.socket, *, max_bytes: int, until: float | None = None) -> Any:
    """A value that the other side sent.

    max_bytes: of all of it. until: on the monotonic clock. Raises: TimeoutError; Broken if the other side has ended, or
    if this is no such value.
    """
    n_body, n_arrays = HEAD.unpack(_bytes(connection, HEAD.size, until).tobytes())
    if n_body > MAX_JSON or n_arrays > MAX_ARRAYS:
        raise Broken("a message is too large")
    sizes = struct.unpack(f"<{n_arrays}Q", _bytes(connection, 8 * n_arrays, until).tobytes())
    if n_body + sum(sizes) > max_bytes:
        raise Broken("a message is too large")
    body = _bytes(connection, n_body, until)
    arrays = [_bytes(connection, size, until) for size in sizes]
    try:
        return _whole(json.loads(body.tobytes()), arrays)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise Broken(f"a message cannot be read: {error}") from error


def _flat(value: Any, arrays: list[Chunks]) -> Any:
    """A value as JSON has it, with its arrays taken out; every object says what it stands for."""
    match value:
        case bytes():
            return _marked("bytes", "", (), [memoryview(value)], arrays)
        case torch.Tensor():
            tensor = value.detach().cpu().contiguous()
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            return _marked("tensor", str(value.dtype).removeprefix("torch."), tuple(value.shape), [data], arrays)
        case np.ndarray() | np.generic():
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise TypeError(f"an array of {array.dtype} cannot be sent")
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            return _marked(kind, array.dtype.str, array.shape, [_raw(array)], arrays)
        case Stack():
            return _marked("array", value.dtype, value.shape, [_raw(array) for array in value.arrays], arrays)
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return {"dict": [[_flat(key, arrays), _flat(one, arrays)] for key, one in value.items()]}
        case list():
            return [_flat(one, arrays) for one in value]
        case tuple():
            return {"tuple": [_flat(one, arrays) for one in value]}
        case _:
            raise TypeError(f"a {type(value).__name__} cannot be sent: it is neither plain data nor an array")


def _raw(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _marked(kind: str, dtype: str, shape: tuple[int, ...], chunks: Chunks, arrays: list[Chunks]) -> Any:
    arrays.append(chunks)
    return {kind: [len(arrays) - 1, dtype, list(shape)]}


def _whole(value: Any, arrays: Sequence[Any]) -> Any:
    """A value with its arrays put back."""
    match value:
        case list():
            return [_whole(one, arrays) for one in value]
        case {"tuple": parts}:
            return tuple(_whole(one, arrays) for one in parts)
        case {"dict": entries}:
            return {_whole(key, arrays): _whole(one, arrays) for key, one in entries}
        case dict():
            ((kind, (index, dtype, shape)),) = value.items()
            return _KINDS[kind](arrays[index], dtype, tuple(shape))
        case _:
            return value


def _array(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = np.dtype(dtype)
    if kind.kind not in "biuf":
        raise ValueError(f"an array of {dtype}")
    return data.view(kind).reshape(shape)


def _tensor(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"a tensor of {dtype}")
    if not len(data):
        return torch.empty(shape, dtype=kind)
    return torch.from_numpy(data).view(kind).reshape(shape)


_KINDS: dict[str, Callable[[np.ndarray, str, tuple[int, ...]], Any]] = {
    "bytes": lambda data, dtype, shape: data.tobytes(),
    "scalar": lambda data, dtype, shape: _array(data, dtype, shape)[()],
    "array": _array,
    "tensor": _tensor,
}


def _bytes(connection: socket.socket, count: int, until: float | None) -> np.ndarray:
    """So many bytes, as an array that can be written to."""
    data = np.empty(count, np.uint8)
    view, have = data.data, 0
    while have < count:
        connection.settimeout(_left(until))
        try:
            got = connection.recv_into(view[have:])
        except TimeoutError:
            raise
        except OSError as error:
            raise Broken(str(error)) from error
        if not got:
            raise Broken("the other side has ended")
        have += got
    return data


def _left(until: float | None) -> float | None:
    """Seconds left.  Raises: TimeoutError."""
    if until is None:
        return None
    if (left := until - monotonic()) <= 0:
        raise TimeoutError
    return left
