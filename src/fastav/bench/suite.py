"""Everything about one model on one device, part by part."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

from transformers import PreTrainedModel

from fastav.adapter import ModelAdapter
from fastav.bench import limits, measure, probes
from fastav.bench.contenders import BASE, Contender
from fastav.bench.measure import Answer, Rounds, Spread
from fastav.bench.subjects import Prompt
from fastav.bench.workload import Workload, build, captures, lacks_memory, release
from fastav.errors import FastAVError
from fastav.flops import kv_bytes

OUT = "out of memory"
Run = TypeVar("Run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What is measured of a model.

    rounds: of prefills; of answers, half as many, and at least two. new_tokens: of an answer; 0 for none. progress:
    called with what is being done, before each run.
    """

    name: str
    model: PreTrainedModel
    adapter: ModelAdapter
    contenders: Sequence[Contender]
    prompts: Sequence[Prompt]
    batches: Sequence[int]
    rounds: int
    new_tokens: int
    rates: limits.Rates
    progress: Callable[[str], Any]

    def parts(self) -> Iterator[dict[str, Any]]:
        """One part for each prompt and batch size, as JSON holds it; one that lacks memory says so and has no rows."""
        for prompt in self.prompts:
            for batch in self.batches:
                part = {"model": self.name, "prompt": prompt.name, "tokens": len(prompt.layout), "batch": batch}
                part |= {"by_modality": prompt.layout.by_modality(), "padding": int(prompt.layout.padding.sum())}
                try:
                    with captures(len(self.contenders)):
                        measured = self._measured(prompt, batch)
                except Exception as error:
                    if not lacks_memory(error):
                        raise
                    measured = {"encode": None, "rows": [], "failed": {"everything": OUT}}
                release()
                yield part | measured

    def _measured(self, prompt: Prompt, batch: int) -> dict[str, Any]:
        where = f"{len(prompt.layout):,} tokens, batch {batch}"
        self.progress(f"{where}: encoders")
        load = build(self.model, self.adapter, prompt, batch)

        def shown(what: str, work: Callable[[Contender], Run]) -> Callable[[Contender], Run]:
            def run(one: Contender) -> Run:
                self.progress(f"{where}: {what} of {one.name}")
                return work(one)

            return run

        prefills = measure.interleaved(self.contenders, self.rounds, shown("prefill", partial(measure.prefill, load)))
        there = [one for one in self.contenders if one.name in prefills.kept]
        answers: Rounds[Answer] = Rounds(first={}, kept={}, failed={})
        if self.new_tokens and there:
            work = partial(measure.answer, load, new_tokens=self.new_tokens)
            answers = measure.interleaved(there, max(2, self.rounds // 2), shown("answer", work))
        self.progress(f"{where}: what cuts and encoders cost")
        rows = [self._row(load, one, prefills, answers) for one in there]
        encode = _refused(partial(probes.encode, load, self.rounds))
        failed = {**prefills.failed, **answers.failed}
        return {"encode": encode and asdict(encode), "rows": rows, "failed": failed}

    def _row(
        self, load: Workload, one: Contender, prefills: Rounds[measure.Prefill], answers: Rounds[Answer]
    ) -> dict[str, Any]:
        runs = prefills.kept[one.name]
        seconds = [run.seconds for run in runs]
        base = prefills.kept.get(BASE)
        row: dict[str, Any] = {"contender": one.name, "plan": one.plan.name, "ours": one.ours}
        row |= {"attention": one.attention, **self._counts(load, one)}
        row |= {
            "prefill": asdict(Spread.of(seconds)),
            "prefill_ratio": base and asdict(Spread.of_ratios(seconds, [run.seconds for run in base])),
            "prefill_limit": row["flops"] / self.rates.flops,
            "prefill_peak_bytes": _most(run.peak_bytes for run in runs),
            "kv_bytes": runs[-1].kv_bytes,
            "compile": self._compile(one, prefills),
            "new_tokens": self.new_tokens,
        }
        row["prefill_over_limit"] = row["prefill"]["median"] / row["prefill_limit"]
        row |= self._of_answers(load, one, answers)
        row["cut"] = self._cut(load, one, row["prefill"]["median"])
        row["waits"] = _refused(partial(probes.wait, load, one))
        return row

    def _compile(self, one: Contender, prefills: Rounds[measure.Prefill]) -> float | None:
        """Seconds that the first prefill took longer than the others; None where nothing is compiled."""
        if not one.compiled:
            return None
        return max(0.0, prefills.first[one.name].wall - median(run.wall for run in prefills.kept[one.name]))

    def _counts(self, load: Workload, one: Contender) -> dict[str, Any]:
        """What the plan foretells: tokens, FLOPs and bytes."""
        shape, batch, n = self.adapter.shape(self.model.config), load.batch, len(load.layout)
        theirs = 1 if load.last_logits else n
        heads = 1 if one.ours else theirs
        tokens, held = one.plan.tokens(load.layout, shape.layers), one.plan.cached(load.layout, shape.layers)
        flops = limits.of_prefill(shape, tokens, heads=heads)
        whole = limits.of_prefill(shape, [n] * shape.layers, heads=theirs)
        itemsize, weights = self.model.dtype.itemsize, limits.weights_read(self.model, self.adapter)
        read = (
            None if weights is None else limits.of_token(shape, weights, held, self.new_tokens, itemsize, batch=batch)
        )
        return {
            "tokens_per_layer": list(tokens),
            "flops": batch * flops,
            "flops_ratio": flops / whole,
            "logits": "last" if heads == 1 else "all",
            "kv_bytes_expected": batch * kv_bytes(shape, held, itemsize),
            "bytes_per_token": read,
            "decode_limit": None if read is None else read / self.rates.bytes,
        }

    def _of_answers(self, load: Workload, one: Contender, answers: Rounds[Answer]) -> dict[str, Any]:
        """What answers cost; None for what was not measured."""
        keys = ("decode", "decode_ratio", "decode_over_limit", "end_to_end", "end_to_end_ratio")
        row: dict[str, Any] = dict.fromkeys((*keys, "capture", "peak_bytes", "peak_ratio"))
        runs, base = answers.kept.get(one.name), answers.kept.get(BASE)
        if not runs:
            return row
        row["end_to_end"] = asdict(Spread.of(seconds := [run.seconds for run in runs]))
        row["peak_bytes"] = self._peak(one, answers)
        if base:
            row["end_to_end_ratio"] = asdict(Spread.of_ratios(seconds, [run.seconds for run in base]))
            if row["peak_bytes"] is not None and (whole := _most(run.peak_bytes for run in base)):
                row["peak_ratio"] = row["peak_bytes"] / whole
        decodes = [run.decode for run in runs if run.decode is not None]
        if decodes:
            row["decode"] = asdict(Spread.of(decodes))
            limit = self._counts(load, one)["decode_limit"]
            row["decode_over_limit"] = None if limit is None else row["decode"]["median"] / limit
            others = [run.decode for run in base or () if run.decode is not None]
            row["decode_ratio"] = asdict(Spread.of_ratios(decodes, others)) if others else None
        if one.ours and _cuda(load):
            row["capture"] = max(0.0, answers.first[one.name].wall - median(run.wall for run in runs))
        return row

    def _peak(self, one: Contender, answers: Rounds[Answer]) -> int | None:
        """Above the weights; what our decoding holds from answer to answer counts, though it was there before."""
        peak = _most(run.peak_bytes for run in answers.kept[one.name])
        return None if peak is None else peak + (answers.first[one.name].kept_bytes if one.ours else 0)

    def _cut(self, load: Workload, one: Contender, prefill: float) -> dict[str, Any] | None:
        if not one.plan.steps:
            return None
        cost = _refused(partial(probes.cut_cost, load, one, self.rounds))
        return None if cost is None else {**asdict(cost), "share": cost.share(prefill)}


def _refused(probe: Any) -> Any:
    """What a probe finds; None if memory is out, or the engine refuses."""
    try:
        return probe()
    except Exception as error:
        if not (isinstance(error, FastAVError) or lacks_memory(error)):
            raise
        return None


def _most(values: Any) -> int | None:
    """The largest; None if any is not known."""
    found = list(values)
    return None if None in found else max(found)


def _cuda(load: Workload) -> bool:
    return load.device.type == "cuda"


def described(plans: Sequence[Contender]) -> Mapping[str, Any]:
    """The steps of every plan."""
    return {one.name: [step.to_dict() for step in one.plan.steps] for one in plans}
