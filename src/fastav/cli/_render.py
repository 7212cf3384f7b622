"""Tables and screens of the commands, drawn from the data that `--json` prints."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fastav.cli._chart import chart
from fastav.cli._text import duration, number, percent, printable, prompt, scaled, size, stdout, width
from fastav.formatting import plural

PHASES = ("media", "encode", "prefill", "decode")


def plan(report: Mapping[str, Any], *, every_layer: bool) -> None:
    """Print the screen of `fastav plan show`."""
    depth = len(report["tokens_per_layer"])
    console = stdout()
    console.print(Text.assemble((report["plan"]["name"] or "plan", "bold"), f"  {report['fingerprint']}"))
    rows = [
        [step["layers"], step["method"]["name"], _settings(step["method"]), _budget_lines(step["keep"])]
        for step in report["plan"]["steps"]
    ]
    if rows:
        console.print("", listing(["layers", "method", "options", "tokens kept"], rows), "", sep="\n")
        if target := report["plan"].get("target"):
            from fastav.target import Target

            console.print(f"target: {Target.from_dict(target)}; for every prompt the steps are scaled to meet it\n")
    else:
        console.print("prunes nothing")
    console.print(f"{report['model']}, {plural(depth, 'layer')}, example prompt: {prompt(report['prompt_tokens'])}")
    console.print(f"{_retention(report)}\n")
    console.print(chart({"": report["tokens_per_layer"]}, every_layer=every_layer))


def _retention(report: Mapping[str, Any]) -> str:
    kept = report["mean_retention"]
    return f"mean retention: {'unknown' if kept is None else percent(kept)} of audio, video and images"


def _settings(method: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in method.items() if key != "name")


def _budget_lines(keep: Mapping[str, Mapping[str, Any]]) -> str:
    templates = {
        "share": lambda value: f"{100 * value:g} % of the remaining tokens",
        "tokens": lambda value: plural(value, "token"),
        "before": lambda value: f"as many as there are before position {number(value)}",
        "frames": lambda value: f"as many as the first {plural(value, 'frame')} {'has' if value == 1 else 'have'}",
        "unpadded": lambda _: "as many as are not padding",
        "between": lambda value: f"{_range(*value)} % of the tokens that enter the decoder",
    }
    return "\n".join(f"{pool}: {templates[kind](value)}" for pool, b in keep.items() for kind, value in b.items())


def _range(low: float, high: float) -> str:
    return f"{100 * low:.4g}" if low == high else f"{100 * low:.4g} to {100 * high:.4g}"


def flops(report: Mapping[str, Any]) -> None:
    """Print the screen of `fastav flops`."""
    decoder, console = report["decoder"], stdout()
    heads = f"{plural(decoder['heads'], 'head')} ({decoder['kv_heads']} for keys and values)"
    console.print(Text.assemble((report["model"], "bold"), "  plan ", (report["plan"]["name"] or "plan", "bold")))
    console.print(
        f"{plural(decoder['layers'], 'layer')}, {decoder['hidden']} wide, MLP {decoder['intermediate']}, {heads}"
    )
    console.print(f"example prompt: {prompt(report['prompt_tokens'])}")
    rows = [
        ("FLOPs, the paper's formula", report["paper_flops"], ""),
        ("FLOPs, counted exactly", report["flops"], ""),
        (f"KV cache, {report['kv_bytes']['dtype']}", report["kv_bytes"], "B"),
    ]
    note = "The paper's formula counts multiply-accumulates of a plain transformer; the paper's tables show its ratio."
    console.print(_retention(report))
    console.print("", costs(rows), Text(note, "dim"), "", chart({"": report["tokens_per_layer"]}), sep="\n")


def comparison(report: Mapping[str, Any]) -> None:
    """Print the screen of `fastav run --compare`."""
    plans, console = report["plans"], stdout()
    versions = " · ".join(f"{name} {version}" for name, version in report["versions"].items())
    runs = f"{plural(report['repeat'], 'run')} each after a warm-up, medians"
    (full, *_) = plans.values()
    console.print(Text.assemble((printable(report["question"]), "bold")))
    console.print(f"{printable(Path(report['clip']).name)}: {prompt(full['prompt_tokens'])}")
    console.print("", _comparison_table(plans), "", sep="\n")
    console.print(chart({name: answer["tokens_per_layer"] for name, answer in plans.items()}))
    console.print(Text(f"\n{report['model']} · {report['device']} · {report['dtype']} · {runs}\n{versions}", "dim"))


def listing(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts with headings; the first column has the names."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, style="bold" if index == 0 else "", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    return table


def cards(entries: Sequence[Mapping[str, str]]) -> RenderableType:
    """A list of entries, one below the other, with a line per property. The first property is the name."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for entry in entries:
        (_, name), *properties = entry.items()
        grid.add_row(Text(name, "bold"))
        for key, value in properties:
            grid.add_row(Text(f"  {key}", "dim"), value)
    return grid


def costs(rows: Sequence[tuple[str, Mapping[str, Any], str]]) -> Table:
    """A table of costs without a plan, with it, and their ratio."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for column in ("", "unpruned", "pruned", "pruned / unpruned"):
        table.add_column(column, justify="right" if column else "left")
    for label, saving, unit in rows:
        format_value = size if unit == "B" else scaled
        table.add_row(
            label, format_value(saving["full"]), format_value(saving["pruned"]), Text(percent(saving["ratio"]), "bold")
        )
    return table


def summary(answer: Mapping[str, Any]) -> Table:
    """The costs of one answer, in four lines."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    seconds, last = answer["seconds"], sum(answer["tokens_per_layer"][-1].values())
    times = " · ".join(f"{phase} {duration(seconds[phase])}" for phase in PHASES if phase in seconds)
    grid.add_row("prompt", f"{prompt(answer['prompt_tokens'])}; {number(last)} in the last layer")
    kept = "" if answer["mean_retention"] is None else f"retention {percent(answer['mean_retention'])} · "
    grid.add_row(
        "prefill",
        f"{kept}{_pruned_of_full(answer['flops'], scaled, 'FLOPs')} · "
        f"KV cache {_pruned_of_full(answer['kv_bytes'], size)}",
    )
    grid.add_row("time", f"{times} ({plural(len(answer['token_ids']), 'token')})")
    grid.add_row("memory", f"{size(answer['peak_bytes'])} at the peak")
    for modality, layer in answer["dropped_ends"].items():
        track = {"audio": "sound"}.get(modality, modality)
        grid.add_row("note", Text(f"from layer {layer} on, nothing of the last third of the {track} remains", "yellow"))
    return grid


def _comparison_table(plans: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of answers and costs side by side. Costs of pruned answers are also given in percent of the unpruned."""
    (reference, full), *others = plans.items()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", width=width())
    table.add_column("", style="dim", no_wrap=True)
    for name in plans:
        table.add_column(name, ratio=1, overflow="fold")
    same = ["same" if full["token_ids"] == answer["token_ids"] else "differs" for _, answer in others]
    table.add_row("answer", *(printable(answer["text"]) for answer in plans.values()))
    table.add_row(f"against {reference}", "", *same, end_section=True)
    for label, key, format_value in (("prefill FLOPs", "flops", scaled), ("KV cache", "kv_bytes", size)):
        table.add_row(label, *_against_first([answer[key]["pruned"] for answer in plans.values()], format_value))
    for phase in (phase for phase in PHASES if phase in full["seconds"]):
        table.add_row(phase, *_against_first([answer["seconds"][phase] for answer in plans.values()], duration))
    totals = [sum(answer["seconds"].values()) for answer in plans.values()]
    table.add_row("all phases", *_against_first(totals, duration))
    lengths = [len(answer["token_ids"]) for answer in plans.values()]
    table.add_row("new tokens", *map(number, lengths), end_section=True)
    peaks = [answer["peak_bytes"] for answer in plans.values()]
    table.add_row("peak memory", *(_against_first(peaks, size) if all(peaks) else map(size, peaks)))
    return table


def _against_first(values: Sequence[float | int], format_value: Callable[[Any], str]) -> list[str]:
    first, *others = values
    return [
        format_value(first),
        *(f"{format_value(value)}  {percent(value / first)}" if first else format_value(value) for value in others),
    ]


def _pruned_of_full(saving: Mapping[str, Any], format_value: Callable[[Any], str], unit: str = "") -> str:
    return (
        f"{format_value(saving['pruned'])}{unit} of {format_value(saving['full'])}{unit} ({percent(saving['ratio'])})"
    )
