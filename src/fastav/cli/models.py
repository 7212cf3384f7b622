"""`fastav models`."""

from fastav.cli import _options, _render
from fastav.cli._output import print_json
from fastav.cli._progress import spinner
from fastav.cli._text import stdout


def models(as_json: _options.Json = False) -> None:
    """List the supported models and their plans."""
    from fastav.registry import MODELS

    with spinner("looking"):
        entries = [
            {
                "name": name,
                "checkpoint": adapter.checkpoint,
                "plans": ["none", *adapter.presets],
                "architectures": sorted(adapter.architectures),
            }
            for name, adapter in MODELS.items()
        ]
    if as_json:
        print_json({"models": entries})
    else:
        cards = [
            {key: value if isinstance(value, str) else ", ".join(value) for key, value in model.items()}
            for model in entries
        ]
        stdout().print(_render.cards(cards))
