"""`fastav models`."""

from fastav.cli import _options, _render
from fastav.cli._json import print_json
from fastav.cli._quiet import working
from fastav.cli._text import stdout


def models(as_json: _options.Json = False) -> None:
    """List the models that fastav knows, with their plans."""
    from fastav.registry import MODELS

    with working("looking"):
        found = [
            {
                "name": name,
                "checkpoint": adapter.checkpoint,
                "plans": ["none", *adapter.presets],
                "architectures": sorted(adapter.architectures),
            }
            for name, adapter in MODELS.items()
        ]
    if as_json:
        print_json({"models": found})
    else:
        shown = [
            {key: value if isinstance(value, str) else ", ".join(value) for key, value in model.items()}
            for model in found
        ]
        stdout().print(_render.cards(shown))
