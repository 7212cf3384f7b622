"""Rendering of pages from their templates, and figures in two widths."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from fastav.report import formatting


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure for wide screens, for narrow ones, and as a text."""

    wide: str
    narrow: str
    alt: str


def both_widths(alt: str, draw: Callable[..., str], *arguments: Any, **options: Any) -> Drawing:
    """The figure that `draw` draws, for wide and for narrow screens."""
    wide, narrow = (draw(*arguments, **options, narrow=narrow) for narrow in (False, True))
    return Drawing(wide, narrow, alt)


def render(template: str, context: Mapping[str, Any]) -> str:
    """The page of a template of this package."""
    folder = resources.files("fastav.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": formatting.percent, "second": formatting.second}
    return environment.get_template(template).render(context)
