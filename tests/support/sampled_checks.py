"""Type checks at run time that stop once a function has been checked often enough in a test.

jaxtyping's import hook checks every call, which takes a third of the tests' time: loops call the same functions with
the same shapes for every layer of every step. Here the first `CALLS` calls of a function in each test are checked, the
rest run as they are. Classes are always checked: they are constructed rarely.
"""

import inspect
import sys
from functools import partial, wraps
from types import FunctionType
from typing import Any

import jaxtyping

# Frames of a function that wraps one of fastav's are skipped where fastav looks for its caller, as jaxtyping's own are.
__name__ = "jaxtyping.sampled_checks"
sys.modules[__name__] = sys.modules["support.sampled_checks"]  # which torch.compile imports by that name

CALLS = 8
_every_call = jaxtyping.jaxtyped
_test = [0]  # the number of the running test


def install() -> None:
    """Make the import hook use these checks, for all modules that are imported from now on."""
    jaxtyping.jaxtyped = _sampled


def next_test() -> None:
    """Check all functions anew."""
    _test[0] += 1


def _sampled(function: Any = None, *, typechecker: Any) -> Any:
    if function is None:
        return partial(_sampled, typechecker=typechecker)
    if isinstance(function, classmethod | staticmethod):
        return type(function)(_sampled(function.__func__, typechecker=typechecker))
    checked = _every_call(function, typechecker=typechecker)
    if not isinstance(function, FunctionType) or inspect.isgeneratorfunction(function):
        return checked
    left, test = CALLS, -1

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left, test
        if test != _test[0]:
            left, test = CALLS, _test[0]
        if not left:
            return function(*args, **kwargs)
        left -= 1
        return checked(*args, **kwargs)

    return call
