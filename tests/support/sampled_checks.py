"""Type checks at run time that leave out calls like those that have been checked.

jaxtyping's import hook checks every call, which takes a third of the tests' time: loops call the same functions with
the same shapes for every layer of every step, and tests call them as other tests do. Here a function's first call in
each test is checked, and of the next `CALLS` each that looks like none before it in this process; the rest run as they
are. How a call looks is the types of its arguments, the dtypes and shapes of arrays, also inside of containers, and the
values of texts and truths. A class is checked by the same rule whenever it is constructed.

Checks are made when a function is called first, not for the many that are imported and not called.
"""

import inspect
import math
import sys
from contextlib import suppress
from dataclasses import is_dataclass
from functools import partial, wraps
from itertools import islice
from types import FunctionType, NoneType
from typing import Any

import jaxtyping

# Frames of a function that wraps one of fastav's are skipped where fastav looks for its caller, as jaxtyping's own are.
__name__ = "jaxtyping.sampled_checks"
sys.modules[__name__] = sys.modules["support.sampled_checks"]  # which torch.compile imports by that name

CALLS = 8
_ITEMS = 8  # of a container, which look
_DEEP = 4  # containers in containers, of which the first two are those of all arguments
_BY_VALUE = frozenset({str, bool, NoneType})
_BY_TYPE = frozenset({int, float, bytes})
_every_call = jaxtyping.jaxtyped
_test = [0]  # the number of the running test


def install() -> None:
    """Make the import hook use these checks, for all modules that are imported from now on."""
    jaxtyping.jaxtyped = _sampled


def next_test() -> None:
    """Check the first call of each function anew."""
    _test[0] += 1


def _sampled(function: Any = None, *, typechecker: Any) -> Any:
    if function is None:
        return partial(_sampled, typechecker=typechecker)
    if isinstance(function, classmethod | staticmethod):
        return type(function)(_sampled(function.__func__, typechecker=typechecker))
    if inspect.isclass(function):
        make: Any = function.__dict__.get("__init__")
        if is_dataclass(function) and make is not None and typechecker is not None:
            function.__init__ = _only_some(make, typechecker, math.inf)
        return function
    if not isinstance(function, FunctionType) or inspect.isgeneratorfunction(function):
        return _every_call(function, typechecker=typechecker)
    return _only_some(function, typechecker, CALLS)


def _only_some(function: Any, typechecker: Any, limit: float) -> Any:
    """The function with checks, which are made when it is called first."""
    checked, test, left = None, -1, 0.0
    known: set[Any] = set()

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked, test, left
        is_first = test != _test[0]
        if is_first:
            test, left = _test[0], limit
        if not left or _is_compiling():  # a compiler would take in what is done here, again and again
            return function(*args, **kwargs)
        left -= 1
        look = _look((args, kwargs), 0)
        if not is_first and _is_among(known, look):
            return function(*args, **kwargs)
        if checked is None:
            checked = _every_call(function, typechecker=typechecker)
        result = checked(*args, **kwargs)
        with suppress(TypeError):
            known.add(look)
        return result

    return call


def _is_compiling() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "compiler") and torch.compiler.is_compiling()


def _is_among(known: set[Any], look: Any) -> bool:
    try:
        return look in known
    except TypeError:  # sizes that torch.export leaves open have no hash
        return False


def _look(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in _BY_VALUE:
        return value
    if kind in _BY_TYPE:
        return kind
    if kind is tuple or kind is list:
        return kind, len(value), *(_look(one, depth + 1) for one in (value[:_ITEMS] if depth < _DEEP else ()))
    if kind is dict:
        some = islice(value.items(), _ITEMS) if depth < _DEEP else ()
        return kind, len(value), *((_look(key, depth + 1), _look(one, depth + 1)) for key, one in some)
    shape = getattr(value, "shape", None) if hasattr(kind, "dtype") else None
    return kind if shape is None else (kind, value.dtype, shape)
