"""Hooks on attention calls of chosen modules: observe their final queries and keys, or override their attention.

transformers looks up its attention function by `ALL_ATTENTION_FUNCTIONS.get_interface` at every call. While at least
one module is observed or overridden, that method is wrapped on the instance; other modules run as before, in any
thread. Queries and keys are those after norms and RoPE.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Observer = Callable[[Tensor, Tensor, Tensor | None, float], None]  # query, key, attention mask, scaling
Attention = Callable[..., Any]  # the overridden function, then the arguments of transformers: module, query, key, ...

_lock = threading.Lock()
_installed: list[tuple[Any, Any]] = []  # our `get_interface`, and the instance attribute before it
_observers: WeakKeyDictionary[nn.Module, tuple[Observer, ...]] = WeakKeyDictionary()
_replacements: WeakKeyDictionary[nn.Module, tuple[Attention, ...]] = WeakKeyDictionary()


@contextmanager
def observe_attention(module: nn.Module, observer: Observer) -> Iterator[None]:
    """Call `observer` before every attention call of `module`, after observers that were registered earlier."""
    with _registered(_observers, module, observer):
        yield


@contextmanager
def override_attention(module: nn.Module, attention: Attention) -> Iterator[None]:
    """Call `attention` in place of the attention of `module`, in every thread; the last override wins."""
    with _registered(_replacements, module, attention):
        yield


@contextmanager
def _registered(table: WeakKeyDictionary[nn.Module, tuple[Any, ...]], module: nn.Module, entry: Any) -> Iterator[None]:
    with _lock:
        if not (_observers or _replacements):
            _install()
        table[module] = (*table.get(module, ()), entry)
    try:
        yield
    finally:
        with _lock:
            entries = list(table[module])
            entries.remove(entry)
            if entries:
                table[module] = tuple(entries)
            else:
                del table[module]
            if not (_observers or _replacements):
                _uninstall()


def _uninstall() -> None:
    """Restore the method, unless someone else has replaced ours in the meantime."""
    attributes, (ours, before) = vars(ALL_ATTENTION_FUNCTIONS), _installed.pop()
    if attributes.get("get_interface") is not ours:
        return
    if before is None:
        del attributes["get_interface"]
    else:
        attributes["get_interface"] = before


def _install() -> None:
    original = ALL_ATTENTION_FUNCTIONS.get_interface
    before = vars(ALL_ATTENTION_FUNCTIONS).get("get_interface")

    # observers must not become part of a compiled layer
    call: Any = torch.compiler.disable(_call_attention)

    def get_interface(attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return partial(call, original(attn_implementation, default))

    vars(ALL_ATTENTION_FUNCTIONS)["get_interface"] = get_interface
    _installed.append((get_interface, before))


def _call_attention(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    for observer in _observers.get(module, ()):
        scaling = kwargs.get("scaling")
        observer(query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    if replacements := _replacements.get(module):
        function = partial(replacements[-1], function)
    return function(module, query, key, value, attention_mask, *args, **kwargs)
