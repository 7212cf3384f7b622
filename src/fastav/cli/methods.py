"""`fastav methods`."""

from typing import Any

from fastav.cli import _options, _render
from fastav.cli._output import print_json
from fastav.cli._progress import spinner
from fastav.cli._text import stdout
from fastav.cli._types import Method


def methods(as_json: _options.Json = False) -> None:
    """List the methods that score tokens."""
    from fastav.registry import METHODS

    with spinner("looking"):
        entries = [_describe(name, method) for name, method in METHODS.items()]
    if as_json:
        print_json({"methods": entries})
    else:
        rows = [
            [
                m["name"],
                m["summary"].removesuffix("."),
                ", ".join(f"{key}={value}" for key, value in m["options"].items()),
                ", ".join([*m["needs"], *(f"{signal} if provided" for signal in m["wants"])]),
            ]
            for m in entries
        ]
        stdout().print(_render.listing(["method", "summary", "options", "needs"], rows))


def _describe(name: str, method: type[Method]) -> dict[str, Any]:
    from dataclasses import MISSING, fields, is_dataclass

    from fastav.method import needs_of, wants_of

    options = fields(method) if is_dataclass(method) else ()
    return {
        "name": name,
        "summary": (method.__doc__ or "").partition("\n")[0],
        "options": {f.name: None if f.default is MISSING else f.default for f in options},
        "needs": sorted(needs_of(name, method)),
        "wants": sorted(wants_of(name, method)),
    }
