"""PyAV, imported when it is first used: what opens no media file runs without it.

Annotations name its classes in quotes for the same reason.
"""

from typing import TYPE_CHECKING, Any

from fastav.errors import InstallationError, reason_of
from fastav.installation import importable


def require_pyav() -> None:
    """Import PyAV, which opens every clip.  Raises: InstallationError if it is missing or broken."""
    try:
        with importable():
            import av.container  # noqa: F401
    except ImportError as error:
        raise InstallationError(
            f"clips need PyAV, which cannot be imported: {reason_of(error)}", "pip install --upgrade av"
        ) from error


class _LazyPyAV:
    """The package `av`.  Raises, when an attribute is read: InstallationError if it is missing or broken."""

    def __getattr__(self, name: str) -> Any:
        require_pyav()
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
