"""The checks of types that tests run with."""

from dataclasses import dataclass

import jaxtyping
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Float

import fastav.flops
from fastav.models._adapters import to_numpy
from support import sampled_checks


def test_fastavs_own_functions_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        fastav.flops.kv_bytes(None, [1])  # pyright: ignore[reportArgumentType]
    assert to_numpy([1]).tolist() == [1]


def test_the_first_calls_in_every_test_are_checked_and_shapes_with_them():
    @jaxtyping.jaxtyped(typechecker=beartype)
    def twice(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return values + values

    for _ in range(2):
        sampled_checks.next_test()
        for _ in range(sampled_checks.CALLS):
            with pytest.raises(jaxtyping.TypeCheckError):
                twice(np.zeros((2, 2)))
        assert twice(np.ones((2, 2))).sum() == 8


def test_of_calls_that_look_alike_the_first_in_every_test_is_checked():
    results: list[object] = [1]

    @jaxtyping.jaxtyped(typechecker=beartype)
    def last(values: list[np.ndarray], kind: str = "") -> int:
        return results[-1]  # pyright: ignore[reportReturnType]

    assert last([np.zeros(2)]) == 1
    results.append("no number")
    assert last([np.ones(2)]) == "no number"
    for others in (
        {"values": [np.zeros(3)]},
        {"values": [np.zeros(2, np.float32)]},
        {"values": [np.zeros(2)] * 2},
        {"values": [np.zeros(2)], "kind": "another"},
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            last(**others)
    sampled_checks.next_test()
    with pytest.raises(jaxtyping.TypeCheckError):
        last([np.zeros(2)])


def test_dataclasses_are_checked():
    @jaxtyping.jaxtyped(typechecker=beartype)
    @dataclass
    class Point:
        values: Float[np.ndarray, " n"]

    for _ in range(2 * sampled_checks.CALLS):
        assert Point(np.zeros(2)).values.shape == (2,)
    with pytest.raises(jaxtyping.TypeCheckError):
        Point(np.zeros((2, 2)))
