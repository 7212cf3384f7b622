"""PyAV, imported when it is first used: what opens no media file runs without it.

Annotations name its classes in quotes for the same reason.
"""

from typing import TYPE_CHECKING, Any


class _LazyPyAV:
    """The package `av`.  Raises, when an attribute is read: ModuleNotFoundError if it is not installed."""

    def __getattr__(self, name: str) -> Any:
        import av
        import av.container
        import av.error
        import av.filter
        import av.sidedata.sidedata
        import av.stream

        return getattr(av, name)


if TYPE_CHECKING:
    import av
    import av.container
    import av.error
    import av.filter
    import av.sidedata.sidedata
    import av.stream
else:
    av = _LazyPyAV()
