"""The checks of types that tests run with."""

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
