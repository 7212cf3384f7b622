"""The name of the cache in arguments and outputs of transformers: `cache` from 5.24 on, `past_key_values` before.

No other module of fastav spells these names: forwards, layers, `generate` and outputs are accessed through this one.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, wraps
from inspect import signature
from typing import Any

from fastav.errors import FastAVError

NAMES = ("cache", "past_key_values")


@cache
def installed_name() -> str:
    """The name that the installed release of transformers uses."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    known = {field.name for field in fields(BaseModelOutputWithPast)}
    for name in NAMES:
        if name in known:
            return name
    raise FastAVError(
        f"this release of transformers names the cache neither {' nor '.join(NAMES)}",
        "install a release of the range that fastav's metadata names",
    )


def name_in(function: Callable[..., Any]) -> str:
    """The name of a function's cache parameter; the installed release's name if its signature has none."""
    parameters = signature(function).parameters
    return next((name for name in (installed_name(), *NAMES) if name in parameters), installed_name())


def as_argument(value: Any, function: Callable[..., Any] | None = None) -> dict[str, Any]:
    """A cache as a keyword argument of a function, or, without one, by the installed release's name."""
    return {installed_name() if function is None else name_in(function): value}


def in_arguments(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, under either name; None if there is none."""
    return next((arguments[name] for name in _by_preference() if arguments.get(name) is not None), None)


def of_output(output: Any) -> Any:
    """The cache that a forward or `generate` returned; None if it returned none."""
    return getattr(output, installed_name(), None)


def either_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method's cache argument be passed under either name; its signature shows the installed release's.

    Raises: FastAVError, when called with both.
    """
    original = signature(forward)
    parameters = [
        parameter.replace(name=installed_name()) if parameter.name in NAMES else parameter
        for parameter in original.parameters.values()
    ]
    inner_name = next(name for name in original.parameters if name in NAMES)

    @wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        caches = [value for name in NAMES if (value := kwargs.pop(name, None)) is not None]
        if len(caches) > 1:
            raise FastAVError("cache and past_key_values are two names of one argument", "pass one of them")
        if caches:
            kwargs[inner_name] = caches[0]
        return forward(*args, **kwargs)

    result: Any = wrapper
    result.__signature__ = original.replace(parameters=parameters)
    return result


def _by_preference() -> tuple[str, ...]:
    return (installed_name(), *(name for name in NAMES if name != installed_name()))
