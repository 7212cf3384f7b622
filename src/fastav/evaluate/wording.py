"""How the numbers of a report are written, on a terminal, in Markdown and in a chart."""

from collections.abc import Mapping
from typing import Any

NOTHING = "-"


def score(group: Mapping[str, Any]) -> str:
    """`71.2 [68.5, 73.9]`, in points of 100 with the 95 % interval."""
    if group["score"] is None:
        return NOTHING
    low, high = group["interval"]
    return f"{100 * group['score']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def difference(group: Mapping[str, Any]) -> str:
    """`-1.2 [-3.1, +0.7]`, in points of 100 with the 95 % interval."""
    found = group["against_reference"]
    return f"{found['points']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}]" if found else NOTHING


def p(group: Mapping[str, Any]) -> str:
    """`0.031` or `< 0.001`."""
    found = group["against_reference"]
    if not found or found["p"] is None:
        return NOTHING
    return "< 0.001" if found["p"] < 0.001 else f"{found['p']:.3f}"


def percent(ratio: float | None) -> str:
    """`53.6 %`."""
    return NOTHING if ratio is None else f"{100 * ratio:.1f} %"


def seconds(group: Mapping[str, Any], phase: str) -> str:
    """`815 ms` or `1.85 s`."""
    if phase not in group["seconds"]:
        return NOTHING
    value = group["seconds"][phase]
    return f"{1000 * value:.3g} ms" if value < 0.9995 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def metric(value: float | int | None) -> str:
    """What a task reports of itself: counts as they are, the rest with three decimals."""
    if value is None:
        return NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def metrics(report: Mapping[str, Any]) -> list[str]:
    """The names of what the task reports beyond mean scores."""
    return list(dict.fromkeys(name for plan in report["plans"].values() for name in plan["all"]["metrics"]))


def asked(report: Mapping[str, Any]) -> str:
    """`videollama2 on toy-world, 400 samples, cuda:0, bfloat16`."""
    samples = f"{report['samples']:,} sample{'s' * (report['samples'] != 1)}"
    return f"{report['model']} on {report['task']}, {samples}, {report['device']}, {report['dtype']}"


def circumstances(report: Mapping[str, Any]) -> str:
    """Versions, commit and machine; several where a file was continued elsewhere."""
    runs = report["runs"]
    versions = [" · ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()) for run in runs]
    commits = [f"commit {run.get('commit') or 'unknown'}" for run in runs]
    machines = [str(machine.get("gpu", machine.get("cpu", ""))) for run in runs for machine in [run.get("machine", {})]]
    return " · ".join(filter(None, (" and ".join(dict.fromkeys(part)) for part in (machines, versions, commits))))


def lacking(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know of answers that are missing or could not be read."""
    lines = []
    for name, plan in report["plans"].items():
        every = plan["all"]
        if every["errors"]:
            lines.append(f"{name}: {every['errors']} of {every['n'] + every['errors']} failed and are left out")
        if (short := report["samples"] - every["n"] - every["errors"]) > 0:
            lines.append(f"{name}: {short} of {report['samples']} have no answer yet")
    return lines
