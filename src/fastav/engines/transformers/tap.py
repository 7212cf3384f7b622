"""A tap on attention calls: it sees the final queries and keys of chosen modules, after norms and RoPE.

transformers looks its attention function up with `ALL_ATTENTION_FUNCTIONS.get_interface` at every call. While at least
one module is tapped, that look-up is wrapped on the instance; modules that nobody taps run as before, in any thread.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Observer = Callable[[Tensor, Tensor, Tensor | None, float], None]  # query, key, attention mask, scaling

_lock = threading.Lock()
_installed: list[tuple[Any, Any]] = []  # our look-up, and what stood on the instance before
_observers: WeakKeyDictionary[nn.Module, tuple[Observer, ...]] = WeakKeyDictionary()


@contextmanager
def tapped(module: nn.Module, observer: Observer) -> Iterator[None]:
    """Call `observer` just before every attention call of `module`, after those that came before it."""
    with _lock:
        if not _observers:
            _install()
        _observers[module] = (*_observers.get(module, ()), observer)
    try:
        yield
    finally:
        with _lock:
            if left := tuple(other for other in _observers[module] if other is not observer):
                _observers[module] = left
            else:
                del _observers[module]
            if not _observers:
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

    @lru_cache(maxsize=64)
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_observe_then, function)

    def get_interface(attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return wrap(plain(attn_implementation, default))

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
    return function(module, query, key, value, attention_mask, *args, **kwargs)
