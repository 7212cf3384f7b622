"""`fastav recipes`."""

import inspect
from collections.abc import Callable
from typing import Any

from fastav.cli import _options, _render
from fastav.cli._output import print_json
from fastav.cli._progress import spinner
from fastav.cli._text import stdout
from fastav.cli._types import Plan


def recipes(as_json: _options.Json = False) -> None:
    """List published approaches as plans for any model, for example `fastv` or `fastv@0.25`."""
    from fastav.registry import RECIPES

    with spinner("looking"):
        entries = [_describe(name, recipe) for name, recipe in RECIPES.items()]
    if as_json:
        print_json({"recipes": entries})
    else:
        rows = [
            [r["name"], r["summary"], ", ".join(f"{key}={value}" for key, value in r["arguments"].items()), r["source"]]
            for r in entries
        ]
        stdout().print(_render.listing(["recipe", "what it does", "arguments", "source"], rows))


def _describe(name: str, recipe: Callable[..., Plan]) -> dict[str, Any]:
    lines = (inspect.getdoc(recipe) or "").splitlines() or [""]
    sources = (line.removeprefix("Source:").strip() for line in lines if line.startswith("Source:"))
    return {
        "name": name,
        "summary": lines[0].removesuffix("."),
        "arguments": {p.name: p.default for p in inspect.signature(recipe).parameters.values()},
        "source": next(sources, "").removesuffix("."),
    }
