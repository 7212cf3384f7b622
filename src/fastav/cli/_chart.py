"""The chart of tokens per layer. Modalities have a letter and a colour, so it is readable without colour."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from fastav.cli._text import MODALITIES, number, width

LETTERS = {"video": "V", "audio": "A", "image": "I", "clip": "C", "media": "M", "text": "T", "all": "X"}
COLOURS = {
    "video": "color(153) on color(25)",
    "audio": "color(223) on color(130)",
    "image": "color(194) on color(29)",
    "clip": "color(225) on color(96)",
    "media": "color(225) on color(96)",
    "text": "color(254) on color(241)",
    "all": "color(225) on color(96)",
}

Layers = Sequence[Mapping[str, int]]  # of each layer, the tokens that it processes, by modality


def chart(plans: Mapping[str, Layers], *, every_layer: bool = False) -> RenderableType:
    """The chart of tokens per layer and modality, as bars and numbers.

    Consecutive layers with equal counts share one line, unless `every_layer` is set.
    """
    layers = [layer for plan in plans.values() for layer in plan]
    present = [modality for modality in MODALITIES if any(layer.get(modality) for layer in layers)]
    largest = max(sum(layer.values()) for layer in layers)
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.width = width()
    headings = ["plan"] * (len(plans) > 1) + ["layer"]
    for heading in headings:
        table.add_column(heading, no_wrap=True, style="dim" if heading == "layer" else "bold")
    table.add_column("tokens", ratio=1)
    for heading in ("total", *present):
        table.add_column(heading, justify="right", no_wrap=True)
    legend = [Text.assemble((LETTERS[modality], COLOURS[modality]), f" {modality}") for modality in present]
    table.add_row(*(Text(h, "dim not bold") for h in headings), Text("tokens", "dim"), Text("total", "dim"), *legend)
    for name, plan in plans.items():
        label = name
        for span, layer in _spans(plan, every_layer):
            counts = [number(layer[modality]) if layer.get(modality) else "" for modality in present]
            names = [label] if len(plans) > 1 else []
            table.add_row(*names, span, Bar(layer, largest), number(sum(layer.values())), *counts)
            label = ""
    pools = " and ".join(modality for modality in present if modality in ("clip", "media", "all"))
    note = Text(f"{pools}: modalities with one common budget; the scores decide the split", "dim")
    return Group(table, note) if pools else table


class Bar:
    """A row of letters for tokens by modality; `largest` tokens fill the column."""

    def __init__(self, tokens: Mapping[str, int], largest: int) -> None:
        self.tokens, self.largest = tokens, largest

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(8, options.max_width), options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for modality, cells in letters(self.tokens, self.largest, options.max_width).items():
            yield Segment(LETTERS[modality] * cells, Style.parse(COLOURS[modality]))
        yield Segment.line()


def letters(tokens: Mapping[str, int], largest: int, width: int) -> dict[str, int]:
    """The number of letters per modality, where `most` tokens fill `width`; at least one for every modality present."""
    present = [modality for modality in MODALITIES if tokens.get(modality)]
    cells = {modality: max(1, round(tokens[modality] * width / largest)) for modality in present}
    while sum(cells.values()) > max(width, len(present)):
        cells[max(cells, key=lambda modality: cells[modality])] -= 1
    return cells


def _spans(layers: Layers, every_layer: bool) -> Iterator[tuple[str, Mapping[str, int]]]:
    for _, group in groupby(enumerate(layers), key=lambda pair: pair[0] if every_layer else dict(pair[1])):
        (first, layer), *rest = group
        yield (f"{first}-{rest[-1][0]}" if rest else str(first)), layer
