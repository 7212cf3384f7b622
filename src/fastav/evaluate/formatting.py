"""Numbers of a report as text, for terminals, Markdown and charts."""

from collections.abc import Mapping
from typing import Any

NO_VALUE = "-"
AGREEMENT = ("plan", "same answer", "ROUGE-L", "KL")  # headings of `agreement`


def score(group: Mapping[str, Any]) -> str:
    """The score of 100 points with its 95 % interval: `71.2 [68.5, 73.9]`."""
    return NO_VALUE if group["score"] is None else points({"mean": group["score"], "interval": group["interval"]})


def difference(group: Mapping[str, Any]) -> str:
    """The difference to the unpruned model in points, with its 95 % interval: `-1.2 [-3.1, +0.7]`."""
    gain = group["against_reference"]
    return f"{gain['points']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]" if gain else NO_VALUE


def p(group: Mapping[str, Any]) -> str:
    """The p value: `0.031` or `< 0.001`."""
    gain = group["against_reference"]
    if not gain or gain["p"] is None:
        return NO_VALUE
    return "< 0.001" if gain["p"] < 0.001 else f"{gain['p']:.3f}"


def percent(ratio: float | None) -> str:
    """A ratio in percent: `53.6 %`."""
    return NO_VALUE if ratio is None else f"{100 * ratio:.1f} %"


def seconds(group: Mapping[str, Any], phase: str) -> str:
    """The seconds of a phase: `815 ms` or `1.85 s`."""
    return duration(group["seconds"].get(phase))


def duration(value: float | None) -> str:
    """Seconds: `815 ms` or `1.85 s`."""
    if value is None:
        return NO_VALUE
    return f"{1000 * value:.3g} ms" if value < 0.9995 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def points(share: Mapping[str, Any] | None) -> str:
    """A share of 100 points with its 95 % interval: `71.2 [68.5, 73.9]`."""
    if share is None:
        return NO_VALUE
    low, high = share["interval"]
    return f"{100 * share['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def kl(divergence: Mapping[str, Any] | None) -> str:
    """A mean divergence with its 95 % interval: `0.0123 [0.01, 0.015]`."""
    if divergence is None:
        return NO_VALUE
    interval = divergence["interval"]
    return nats(divergence["mean"]) + (f" [{interval[0]:.2g}, {interval[1]:.2g}]" if interval else "")


def nats(value: float | None) -> str:
    """A divergence with three digits."""
    return NO_VALUE if value is None else f"{value:.3g}"


def agreement(report: Mapping[str, Any]) -> list[list[str]]:
    """A row for every plan that is compared with the unpruned answers; KL is empty where it is not measured."""
    return [
        [name, points(found["exact"]), points(found["rouge_l"]), kl(found["kl"])]
        for name, plan in report["plans"].items()
        if (found := plan["all"]["agreement"]) is not None
    ]


def metric(value: float | int | None) -> str:
    """A metric of a task: an integer as it is, another number with three decimals."""
    if value is None:
        return NO_VALUE
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def metrics(report: Mapping[str, Any]) -> list[str]:
    """The names of the metrics that the task reports beyond mean scores."""
    return list(dict.fromkeys(name for plan in report["plans"].values() for name in plan["all"]["metrics"]))


def title(report: Mapping[str, Any]) -> str:
    """The title of a report: `videollama2 on toy-world, 400 samples, cuda:0, bfloat16`."""
    samples = f"{report['samples']:,} sample{'s' * (report['samples'] != 1)}"
    return f"{report['model']} on {report['task']}, {samples}, {report['device']}, {report['dtype']}"


def provenance(report: Mapping[str, Any]) -> str:
    """Machine, versions and commit; several if a file was continued on another machine or version."""
    runs = report["runs"]
    versions = [" · ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()) for run in runs]
    commits = [f"commit {run.get('commit') or 'unknown'}" for run in runs]
    machines = [str(machine.get("gpu", machine.get("cpu", ""))) for run in runs for machine in [run.get("machine", {})]]
    return " · ".join(filter(None, (" and ".join(dict.fromkeys(part)) for part in (machines, versions, commits))))


def missing_answers(report: Mapping[str, Any]) -> list[str]:
    """Lines about answers that failed or are missing."""
    lines = []
    for name, plan in report["plans"].items():
        total = plan["all"]
        if total["errors"]:
            lines.append(f"{name}: {total['errors']} of {total['n'] + total['errors']} failed and are left out")
        if (missing := report["samples"] - total["n"] - total["errors"]) > 0:
            lines.append(f"{name}: {missing} of {report['samples']} have no answer yet")
    return lines
