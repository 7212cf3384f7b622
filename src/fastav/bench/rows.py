"""The rows of a part: what each contender cost for one prompt and batch size, as JSON holds it."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeVar

from fastav.bench import limits, probes
from fastav.bench.contenders import BASELINE, Contender
from fastav.bench.measure import AnswerRun, PrefillRun, Quartiles, Rounds
from fastav.bench.workload import Workload, is_out_of_memory
from fastav.errors import FastAVError
from fastav.flops import kv_bytes
from fastav.retention import mean_retention

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRuns:
    """The runs of one part.  new_tokens: of an answer; 0 for none."""

    workload: Workload
    rates: limits.Rates
    rounds: int
    new_tokens: int
    prefills: Rounds[PrefillRun]
    answers: Rounds[AnswerRun]

    def row(self, contender: Contender) -> dict[str, Any]:
        """The row of a contender whose prefills were measured.  Probes the cost of its cuts and its waits."""
        name, counts = contender.name, self._counts(contender)
        runs, base = self.prefills.results[name], self.prefills.results.get(BASELINE)
        seconds = [run.seconds for run in runs]
        prefill, limit = Quartiles.of(seconds), counts["flops"] / self.rates.flops
        return {
            "contender": name,
            "plan": contender.plan.name,
            "ours": contender.ours,
            "attention": contender.attention,
            **counts,
            "prefill": asdict(prefill),
            "prefill_ratio": base and asdict(Quartiles.of_ratios(seconds, [run.seconds for run in base])),
            "prefill_limit": limit,
            "prefill_peak_bytes": _max_known(run.peak_bytes for run in runs),
            "kv_bytes": runs[-1].kv_bytes,
            "compile": _excess(self.prefills, name) if contender.compiled else None,
            "new_tokens": self.new_tokens,
            "prefill_over_limit": prefill.median / limit,
            **self._answers(contender, counts["decode_limit"]),
            "cut": self._cut(contender, prefill.median),
            "waits": unless_refused(lambda: probes.first_wait(self.workload, contender)),
        }

    def _counts(self, contender: Contender) -> dict[str, Any]:
        """What follows from the plan alone: tokens, FLOPs and bytes."""
        workload, plan = self.workload, contender.plan
        model, adapter, layout, batch = workload.model, workload.adapter, workload.layout, workload.batch
        shape, n = adapter.shape(model.config), len(layout)
        base_heads = 1 if workload.last_logits else n
        heads = 1 if contender.ours else base_heads
        tokens, cached = plan.tokens(layout, shape.layers), plan.cache_tokens(layout, shape.layers)
        flops = limits.prefill_cost(shape, tokens, heads=heads)
        unpruned = limits.prefill_cost(shape, [n] * shape.layers, heads=base_heads)
        itemsize, weights = model.dtype.itemsize, limits.weights_read(model, adapter)
        read = weights and limits.token_cost(shape, weights, cached, self.new_tokens, itemsize, batch=batch)
        return {
            "tokens_per_layer": list(tokens),
            "mean_retention": mean_retention(plan.by_layer(layout, shape.layers), layout.by_modality()),
            "flops": batch * flops,
            "flops_ratio": flops / unpruned,
            "logits": "last" if heads == 1 else "all",
            "kv_bytes_expected": batch * kv_bytes(shape, cached, itemsize),
            "bytes_per_token": read,
            "decode_limit": read and read / self.rates.bytes,
        }

    def _answers(self, contender: Contender, limit: float | None) -> dict[str, Any]:
        """The cost of answers; None for what was not measured.  limit: least seconds of a token."""
        keys = ("decode", "decode_ratio", "decode_over_limit", "end_to_end", "end_to_end_ratio")
        row: dict[str, Any] = dict.fromkeys((*keys, "capture", "peak_bytes", "peak_ratio"))
        name = contender.name
        runs, base = self.answers.results.get(name), self.answers.results.get(BASELINE)
        if not runs:
            return row
        seconds = [run.seconds for run in runs]
        row["end_to_end"] = asdict(Quartiles.of(seconds))
        peak = _max_known(run.peak_bytes for run in runs)
        if peak is not None and contender.ours:  # what our decoding holds from answer to answer counts as its memory
            peak += self.answers.warmup[name].retained_bytes
        row["peak_bytes"] = peak
        if base:
            row["end_to_end_ratio"] = asdict(Quartiles.of_ratios(seconds, [run.seconds for run in base]))
            if peak is not None and (base_peak := _max_known(run.peak_bytes for run in base)):
                row["peak_ratio"] = peak / base_peak
        if decodes := [run.decode for run in runs if run.decode is not None]:
            decode = Quartiles.of(decodes)
            row["decode"], row["decode_over_limit"] = asdict(decode), limit and decode.median / limit
            base_decodes = [run.decode for run in base or () if run.decode is not None]
            row["decode_ratio"] = asdict(Quartiles.of_ratios(decodes, base_decodes)) if base_decodes else None
        if contender.ours and self.workload.device.type == "cuda":
            row["capture"] = _excess(self.answers, name)
        return row

    def _cut(self, contender: Contender, prefill: float) -> dict[str, Any] | None:
        if not contender.plan.steps:
            return None
        cost = unless_refused(lambda: probes.cut_cost(self.workload, contender, self.rounds))
        return cost and {**asdict(cost), "share": cost.share(prefill)}


def unless_refused(probe: Callable[[], Result]) -> Result | None:
    """The result of a probe; None if memory runs out, or the engine refuses."""
    try:
        return probe()
    except Exception as error:
        if not (isinstance(error, FastAVError) or is_out_of_memory(error)):
            raise
        return None


def _excess(rounds: Rounds[Any], name: str) -> float:
    """Seconds that the warm-up took longer than the other rounds, such as for compiling or capturing."""
    return max(0.0, rounds.warmup[name].wall - median(run.wall for run in rounds.results[name]))


def _max_known(values: Iterable[int | None]) -> int | None:
    """The largest value; None if any is unknown."""
    known = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return max(known)
