"""Write the tables of models and of the costs of plans into README.md and docs: `make tables`.

The tables are computed without weights: parameters from the release's configuration; tokens and FLOPs from the
adapter's example of a 1280 x 720 clip with sound and 44 text tokens.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import torch

import conftest  # noqa: F401  (Gemma 3n's vision tower is timm's, which `make setup` puts where tests find it)
from fastav.adapter import ModelAdapter
from fastav.budgets import Before, Budget, Frames, Share, Tokens
from fastav.engines.vllm.guards import MODELS as SERVED
from fastav.flops import prefill_flops
from fastav.layout import Layout, Modality
from fastav.plan import Plan
from fastav.registry import MODELS

ROOT = Path(__file__).parents[1]
CLIPS, TEXT = (10, 30, 60), 44
PLANS = ("fastav", "fastav-plus", "fastav-trim")
HEAD = (
    "| model | name | parameters | video + audio tokens of a clip of 10 / 30 / 60 s | padding | `fastav` keeps "
    "| FLOPs | checked against |"
)
OWN = {"videollama2", "video-salmonn2", "video-salmonn2-plus"}  # implemented in fastav


@cache
def table() -> str:
    """The table of all models except the embedded one, as Markdown."""
    return "\n".join([HEAD, "|---" * (HEAD.count("|") - 1) + "|", *map(row, adapters())])


@cache
def summary() -> str:
    """The short table as Markdown: input of every model, whether vLLM can prune it, and the costs of two plans."""
    head = "| model | name | input | vLLM | `fastav` | `fastav-plus` |"
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *map(summary_of, adapters())])


@cache
def costs() -> str:
    """The table of prefill FLOPs by model, plan and length of the clip, as Markdown."""
    head = f"| model | {' | '.join(f'`{name}`' for name in PLANS)} |"
    return "\n".join([head, "|---" * (len(PLANS) + 1) + "|", *map(costs_of, adapters())])


def adapters() -> list[ModelAdapter]:
    """The adapters of all models, except the embedded one and those of other packages."""
    names = (name for name in MODELS if not name.startswith("tiny"))
    return [MODELS[name]() for name in names if MODELS[name].__module__.startswith("fastav.")]


def summary_of(adapter: ModelAdapter) -> str:
    """The row of a model in the short table."""
    layout = adapter.example(adapter.config(), seconds=30, text=TEXT)
    cells = [
        f"[{adapter.checkpoint.split('/')[1]}](docs/{adapter.name}.md)",
        f"`{adapter.name}`",
        "video, audio" if layout.count(Modality.AUDIO) else "video",
        "yes" if adapter.name in SERVED else "no",
        *(percent([ratio(adapter, adapter.preset(name), layout)]) for name in ("fastav", "fastav-plus")),
    ]
    return f"| {' | '.join(cells)} |"


def costs_of(adapter: ModelAdapter) -> str:
    """The row of a model in the table of costs, for clips of 10, 30 and 60 s."""
    config = adapter.config()
    layouts = [adapter.example(config, seconds=seconds, text=TEXT) for seconds in CLIPS]
    cells = (percent(ratio(adapter, adapter.preset(name), layout) for layout in layouts) for name in PLANS)
    return f"| [{adapter.checkpoint.split('/')[1]}](docs/{adapter.name}.md) | {' | '.join(cells)} |"


def row(adapter: ModelAdapter) -> str:
    """The row of a model in the table of models."""
    config, plan = adapter.config(), adapter.presets["fastav"]
    layouts = [adapter.example(config, seconds=seconds, text=TEXT) for seconds in CLIPS]
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in adapter.build(config).parameters())
    page = f"docs/{adapter.name}.md"
    cells = [
        f"[{adapter.checkpoint.split('/')[1]}]({page})",
        f"`{adapter.name}`",
        f"{parameters / 1e9:.1f} B",
        " / ".join(map(clip, layouts)),
        percent(share(layout) for layout in layouts),
        kept(plan),
        percent(ratio(adapter, plan, layout) for layout in layouts),
        "the authors' code" if adapter.name in OWN else "transformers' model, masked",
    ]
    return f"| {' | '.join(cells)} |"


def percent(shares: Iterable[float]) -> str:
    """Shares as the text of a cell."""
    return " / ".join(f"{share:.0%}".replace("%", " %") for share in shares)


def clip(layout: Layout) -> str:
    """The number of visual tokens of the clip, and of audio tokens if there are any."""
    seen, heard = layout.count(Modality.VIDEO, Modality.IMAGE), layout.count(Modality.AUDIO)
    return f"{seen:,} + {heard:,}" if heard else f"{seen:,}"


def share(layout: Layout) -> float:
    """The share of padding in the clip's tokens."""
    return float(layout.padding.sum()) / (len(layout) - layout.count(Modality.TEXT))


def ratio(adapter: ModelAdapter, plan: Plan, layout: Layout) -> float:
    """The prefill FLOPs of a plan over those of the unpruned model."""
    shape = adapter.shape(adapter.config())
    full = [len(layout)] * shape.layers
    return prefill_flops(shape, plan.tokens(layout, shape.layers)) / prefill_flops(shape, full)


def kept(plan: Plan) -> str:
    """The budgets of the plan's global cut, as text."""
    first = plan.steps[0]
    return ", ".join(words(budget, name) for name, budget in budgets(first.keep))


def budgets(keep: object) -> Iterator[tuple[str, Budget]]:
    """The name and value of every budget that is set."""
    for field in fields(keep):
        if (budget := getattr(keep, field.name)) is not None:
            yield field.name, budget


def words(budget: Budget, name: str) -> str:
    """A budget as text."""
    what = "of the clip" if name in ("clip", "media") else name
    match budget:
        case Tokens(number=number):
            return f"first {number} {what}"
        case Share(share=part):
            return f"first {part:.0%}".replace("%", " %") + f" {what}"
        case Frames(frames=frames):
            return f"first {frames} frames {what}"
        case Before(position=position):
            return f"before {position} {what}"
    raise TypeError(type(budget).__name__)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "README.md": ("summary", summary),
    "docs/models.md": ("models", table),
    "docs/choose-a-plan.md": ("costs", costs),
}


def written(text: str, path: str) -> str:
    """The file's text with its table between the marks and links relative to the file."""
    mark, make = TABLES[path]
    start, end = f"<!-- {mark}: make tables -->", f"<!-- /{mark} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    content = make()
    if path.startswith("docs/"):
        content = content.replace("](docs/", "](")
    return f"{before}{start}\n{content}\n{end}{after}"


def main() -> int:
    """Write the tables, or with `--check` compare them.  Returns 1 if `--check` finds an outdated table."""
    stale = False
    for path in TABLES:
        text = (ROOT / path).read_text(encoding="utf-8")
        new = written(text, path)
        if new != text:
            stale = True
            print(path)
            if "--check" not in sys.argv:
                (ROOT / path).write_text(new, encoding="utf-8")
    return int(stale and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
