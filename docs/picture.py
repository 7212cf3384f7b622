"""Draw docs/tokens.svg, the tokens of every layer of VideoLLaMA2 with the preset `fastav`: `python docs/picture.py`.

The numbers come from the plan. After the first fine cut, audio and video share one budget and one colour, because their
proportion depends on the clip.
"""

from pathlib import Path

from fastav.budgets import Tokens
from fastav.layout import MEDIA, Layout, Modality
from fastav.plan import Keep, Plan
from fastav.presets import fastav

TOKENS = {Modality.VIDEO: 676, Modality.AUDIO: 1496, Modality.TEXT: 44}
COLOURS = {"video": "#3b7dd8", "audio": "#e8893a", "audio or video": "#8a6fb8", "text": "#5a5f66"}
DEPTH, LEFT, TOP, WIDTH, HEIGHT = 28, 62, 58, 24, 250


def layers(plan: Plan, layout: Layout) -> list[dict[str, int]]:
    """The number of tokens of each kind in every layer."""
    names = {frozenset({m}): m.label for m in TOKENS} | {frozenset(MEDIA): "audio or video"}
    rows = [{names[group]: n for group, n in there.items() if n} for there in plan.layers(layout, DEPTH)]
    return [{kind: row[kind] for kind in COLOURS if kind in row} for row in rows]


def draw(rows: list[dict[str, int]]) -> str:
    """The chart as an SVG document."""
    total = sum(TOKENS.values())
    parts = []
    for layer, row in enumerate(rows):
        y, x = TOP + HEIGHT, LEFT + layer * WIDTH
        for kind, count in row.items():
            height = HEIGHT * count / total
            y -= height
            box = f'x="{x}" y="{y:.1f}" width="{WIDTH - 4}" height="{height:.1f}"'
            parts.append(f'<rect {box} fill="{COLOURS[kind]}"><title>layer {layer}: {count} {kind}</title></rect>')
        if layer % 7 == 0 or layer == DEPTH - 1:
            parts.append(text(x + 10, TOP + HEIGHT + 18, str(layer), "middle"))
        if layer in (0, 14, 27):
            parts.append(text(x + 10, y - 6, f"{sum(row.values()):,}", "middle"))
    middle = LEFT + 14 * WIDTH - 2
    parts += [
        f'<path d="M{middle} {TOP - 8}V{TOP + HEIGHT}" stroke="#c0392b" stroke-dasharray="5 4" fill="none"/>',
        text(middle + 10, TOP + 8, "global cut, once", weight="bold"),
        text(middle + 10, TOP + 26, "all video and the first 10 audio tokens stay"),
        text(middle + 10, TOP + 62, "fine cut, after every later layer", weight="bold"),
        text(middle + 10, TOP + 80, "of audio and video the 20 % go that the"),
        text(middle + 10, TOP + 98, "last query attends to least"),
        text(LEFT - 4, TOP + HEIGHT + 40, "decoder layer of VideoLLaMA2.1-7B-AV; tokens that it runs on"),
    ]
    for i, (kind, colour) in enumerate(COLOURS.items()):
        x = LEFT + (0, 90, 180, 320)[i]
        parts.append(f'<rect x="{x}" y="16" width="12" height="12" fill="{colour}"/>' + text(x + 18, 27, kind))
    width, height = LEFT + DEPTH * WIDTH + 20, TOP + HEIGHT + 56
    background = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    return "\n".join([head, background, *parts, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    """An SVG element with a line of text."""
    style = f'font-size="13" font-weight="{weight}" fill="#222" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y:.1f}" {style}>{words}</text>'


if __name__ == "__main__":
    everything = Layout.join(
        [
            Layout.of(Modality.VIDEO, TOKENS[Modality.VIDEO]),
            Layout.of(Modality.AUDIO, TOKENS[Modality.AUDIO]),
            Layout.of(Modality.TEXT, TOKENS[Modality.TEXT]),
        ]
    )
    picture = draw(layers(fastav(Keep(audio=Tokens(10))), everything))
    Path(__file__).with_name("tokens.svg").write_text(picture, encoding="utf-8")
