"""A tap on attention calls: it sees the final queries and keys of chosen modules, after norms and RoPE.

transformers looks its attention function up with `ALL_ATTENTION_FUNCTIONS.get_interface` at every call. While at least
one module is tapped or has its attention replaced, that look-up is wrapped on the instance; other modules run as
before, in any thread.
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
Attention = Callable[..., Any]  # what it stands in for, and then as transformers calls that: module, query, key, ...

_lock = threading.Lock()
_installed: list[tuple[Any, Any]] = []  # our look-up, and what stood on the instance before
_observers: WeakKeyDictionary[nn.Module, tuple[Observer, ...]] = WeakKeyDictionary()
_replacements: WeakKeyDictionary[nn.Module, tuple[Attention, ...]] = WeakKeyDictionary()


@contextmanager
def observe_attention(module: nn.Module, observer: Observer) -> Iterator[None]:
    """Call `observer` just before every attention call of `module`, after those that came before it."""
    with _entered(_observers, module, observer):
        yield


@contextmanager
def override_attention(module: nn.Module, attention: Attention) -> Iterator[None]:
    """Have `attention` called in place of the attention of `module`, in every thread; the last one given holds."""
    with _entered(_replacements, module, attention):
        yield


@contextmanager
def _entered(table: WeakKeyDictionary[nn.Module, tuple[Any, ...]], module: nn.Module, entry: Any) -> Iterator[None]:
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
    """Put back what was there, unless someone else has replaced ours meanwhile."""
    own, (ours, before) = vars(ALL_ATTENTION_FUNCTIONS), _installed.pop()
    if own.get("get_interface") is not ours:
        return
    if before is None:
        del own["get_interface"]
    else:
        own["get_interface"] = before


def _install() -> None:
    plain = ALL_ATTENTION_FUNCTIONS.get_interface
    before = vars(ALL_ATTENTION_FUNCTIONS).get("get_interface")

    # what observers note must not become part of a compiled layer
    observe: Any = torch.compiler.disable(_observe_then)

    def get_interface(attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return partial(observe, plain(attn_implementation, default))

    vars(ALL_ATTENTION_FUNCTIONS)["get_interface"] = get_interface
    _installed.append((get_interface, before))


def _observe_then(
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
