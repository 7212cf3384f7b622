"""The answers of a calibration for its page: how far they agree, and what they took."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastav.calibrate import AnswerPair, Comparison
from fastav.evaluate.formatting import duration, points
from fastav.report import formatting
from fastav.report.changes import changed_words

SHOWN = 200  # answers of each kind, at most
PHASES = {"prefill": "Prefill", "decode": "Decoding", "decode_per_token": "Decoding, per token"}


def comparison_context(comparison: Comparison, head: Mapping[str, Any]) -> dict[str, Any]:
    """What the page has of a comparison.  head: the settings of the calibration."""
    summary = comparison.summary()
    different = comparison.differences()
    same = [pair for pair in comparison.pairs if pair.agreement.exact]
    return {
        "n": summary["n"],
        "same": len(same),
        "max_new_tokens": comparison.max_new_tokens,
        "scope": _scope(comparison),
        "measures": list(_measures(summary)),
        "different": [_difference(pair, agreement.rouge_l) for pair, agreement in different[:SHOWN]],
        "more_different": max(0, len(different) - SHOWN),
        "equal": [
            {"clip": pair.clip, "question": pair.question, "answer": pair.unpruned["text"]} for pair in same[:SHOWN]
        ],
        "more_equal": max(0, len(same) - SHOWN),
        "failures": comparison.failures,
        "times": list(_times(summary)),
        "noisy": summary["noisy"],
        "machine": formatting.join_list([formatting.machine(one, head) for one in summary["machines"]]),
        "ratios": list(_ratios(summary)),
    }


def agreement_number(comparison: Comparison) -> tuple[str, str, str] | None:
    """The large number at the top of the page: value, name, and explanation; None without answers."""
    exact = comparison.summary()["exact"]
    if exact is None:
        return None
    n, (low, high) = len(comparison.pairs), (100 * bound for bound in exact["interval"])
    value = f"{n - len(comparison.differences()):,} of {n:,}"
    return value, "answers stay the same", f"95{formatting.SPACE}% interval: {low:.0f} to {high:.0f}{formatting.SPACE}%"


def _scope(comparison: Comparison) -> str:
    """Which prompts are answered."""
    n = len(comparison.pairs) + len(comparison.failures)
    if n == comparison.traced:
        return f"all {n:,} prompts" if n > 1 else "the only prompt"
    return f"{n:,} of {formatting.plural(comparison.traced, 'prompt')}, evenly spread"


def _measures(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, count, and the share of 100 with its interval."""
    names = {"exact": "Same answer", "first_token": "Same first token"}
    for key, name in names.items():
        if summary[key] is not None:
            count = round(summary["n"] * summary[key]["mean"])
            yield name, f"{count:,} of {summary['n']:,}", points(summary[key])
    if summary["rouge_l"] is not None:
        yield "ROUGE-L", "", points(summary["rouge_l"])


def _difference(pair: AnswerPair, rouge_l: float) -> dict[str, Any]:
    unpruned, pruned = changed_words(pair.unpruned["text"], pair.pruned["text"])
    only_spaces = not any(is_marked for _, is_marked in (*unpruned, *pruned))
    return {
        "clip": pair.clip,
        "question": pair.question,
        "unpruned": unpruned,
        "pruned": pruned,
        "only_spaces": only_spaces,
        "rouge_l": rouge_l,
    }


def _times(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Phase, median seconds of both, the median ratio, and its quartiles."""
    for phase, name in PHASES.items():
        ratio = summary["time_ratio"][phase]
        if ratio is not None:
            low, high = ratio["quartiles"]
            unpruned, pruned = (duration(summary["seconds"][plan][phase]) for plan in ("unpruned", "pruned"))
            spread = f"{100 * low:.1f} to {formatting.percent(high)}" if ratio["n"] > 1 else "-"
            yield name, unpruned, pruned, formatting.percent(ratio["median"]), spread


def _ratios(summary: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Costs as shares of the unpruned model's: first those computed, then those measured."""
    n = formatting.plural(summary["n"], "prompt")
    for key, name in (("prefill", "Prefill time"), ("decode_per_token", "Decoding time per token")):
        if (ratio := summary["time_ratio"][key]) is not None:
            yield f"{name}, measured, median over {n}", ratio["median"]
