"""One benchmark: its settings, which are checked before any weight is made, and its report."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from fastav.bench import contenders, limits, measure, probes, report, targets
from fastav.bench.contenders import Contender
from fastav.bench.measure import OUT_OF_MEMORY, AnswerRun, Rounds
from fastav.bench.rows import PartRuns, unless_refused
from fastav.bench.specs import ModelSpec, PromptSpec, model_spec, prompt_specs
from fastav.bench.workload import build, build_model, is_out_of_memory, release_memory
from fastav.device import resolve_device
from fastav.engines.transformers.generation.loop import release_steps
from fastav.errors import FastAVError

Show = Callable[[str], Any]
Run = TypeVar("Run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The settings of a benchmark.

    skipped: plans and kinds of attention that are not measured, with reasons. rounds: of prefills; of answers, half as
    many, and at least two. new_tokens: of an answer; 0 for none.
    """

    model: ModelSpec
    prompts: tuple[PromptSpec, ...]
    batches: Sequence[int]
    contenders: tuple[Contender, ...]
    skipped: dict[str, str]
    device: torch.device
    dtype: torch.dtype
    rounds: int
    new_tokens: int
    threads: int
    commit: str | None
    arguments: Sequence[str]

    @classmethod
    def of(
        cls,
        model: str,
        *,
        plans: Sequence[str] = (),
        batches: Sequence[int] = (1,),
        tokens: Sequence[int] = (),
        seconds: Sequence[float] = (),
        new_tokens: int | None = None,
        rounds: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        attentions: Sequence[str] = (),
        compiled: bool = False,
        threads: int = 1,
        commit: str | None = None,
        arguments: Sequence[str] = (),
    ) -> "Session":
        """The benchmark with a user's options; None stands for the device's default.

        Raises: FastAVError, and its subclasses, for options that cannot be measured.
        """
        if tokens and seconds:
            raise FastAVError("--tokens and --seconds are two ways to say how long a prompt is", "give one of them")
        place, dtype_name = resolve_device(device, dtype)
        gpu = place.type == "cuda"
        spec = model_spec(model)
        prompts = prompt_specs(spec, tokens=tokens, seconds=seconds)
        kinds, missing = contenders.available_attentions(attentions, place)
        supported, refused = contenders.supported_plans(spec, plans, prompts, kinds[0])
        return cls(
            model=spec,
            prompts=prompts,
            batches=list(batches),
            contenders=contenders.contenders(supported, kinds, compiled=compiled),
            skipped=missing | refused,
            device=place,
            dtype=getattr(torch, dtype_name),
            rounds=rounds if rounds is not None else 12 if gpu else 5,
            new_tokens=new_tokens if new_tokens is not None else 32 if gpu else 0,
            threads=threads,
            commit=commit,
            arguments=arguments,
        )

    @property
    def file(self) -> str:
        """The name of the report's file: by model, prompts and device."""
        lengths = [prompt.name for prompt in self.prompts if prompt.name != "example"]
        return "-".join(["speed", self.model.name, *lengths, self.device.type]) + ".json"

    @torch.inference_mode()
    def run(
        self, out: Path | None = None, *, output: Show | None = None, progress: Show | None = None
    ) -> dict[str, Any]:
        """Measure, and return the report.

        out: folder for the report, which is written after every part, so that an error in a later part loses nothing.
        output: called with the heading and with the table of every part. progress: called with the current step.
        Raises: FastAVError if the weights do not fit into memory, or nothing could be measured.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        gc.collect()
        gc.freeze()  # later collections, one before every run, skip the objects that exist now
        try:
            return self._run(out, output or (lambda _: None), progress or (lambda _: None))
        finally:
            gc.unfreeze()
            torch.set_num_threads(threads)

    def _run(self, out: Path | None, output: Show, progress: Show) -> dict[str, Any]:
        progress("measuring how fast this machine multiplies and copies")
        rates = limits.rates(self.device, self.dtype)
        progress(f"building {self.model.name}")
        model = build_model(self.model, self.device, self.dtype)
        result = self._heading(model, rates)
        output(report.heading(result))
        for part in self._parts(model, rates, progress):
            for row in part["rows"]:
                row["targets"] = targets.verdicts(result, part, row)
            result["parts"].append(part)
            if out is not None:
                report.write(result, out / self.file)
            output(report.table(part))
        if not any(part["rows"] for part in result["parts"]):
            reasons = {reason for part in result["parts"] for reason in part["failed"].values()}
            raise FastAVError(f"nothing could be measured: {'; '.join(sorted(reasons))}", "try less")
        return result

    def _heading(self, model: PreTrainedModel, rates: limits.Rates) -> dict[str, Any]:
        weights = [*model.parameters(), *model.buffers()]
        return {
            "fastav_bench": report.FORMAT,
            **report.circumstances(self.arguments, self.device, self.commit),
            "model": self.model.name,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "decoder": asdict(self.model.adapter.shape(self.model.config)),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "weight_bytes": sum(weight.untyped_storage().nbytes() for weight in weights),
            "rates": {"tflops": rates.flops / 1e12, "gb_per_second": rates.bytes / 1e9},
            "rounds": self.rounds,
            "new_tokens": self.new_tokens,
            "skipped": self.skipped,
            "plans": {one.name: [step.to_dict() for step in one.plan.steps] for one in self.contenders},
            "parts": [],
        }

    def _parts(self, model: PreTrainedModel, rates: limits.Rates, progress: Show) -> Iterator[dict[str, Any]]:
        """A part for each prompt and batch size, as JSON holds it; without rows if memory runs out."""
        for prompt in self.prompts:
            for batch in self.batches:
                part = {"model": self.model.name, "prompt": prompt.name, "tokens": len(prompt.layout), "batch": batch}
                part |= {"by_modality": prompt.layout.by_modality(), "padding": int(prompt.layout.padding.sum())}
                try:
                    result = self._measure(model, rates, prompt, batch, progress)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    result = {"encode": None, "rows": [], "failed": {"everything": OUT_OF_MEMORY}}
                finally:
                    release_steps(model)
                release_memory()
                yield part | result

    def _measure(
        self, model: PreTrainedModel, rates: limits.Rates, prompt: PromptSpec, batch: int, progress: Show
    ) -> dict[str, Any]:
        where = f"{len(prompt.layout):,} tokens, batch {batch}"
        progress(f"{where}: encoders")
        # decoding holds the captures of all contenders, so that none is captured twice
        workload = build(model, self.model.adapter, prompt, batch, max_captures=len(self.contenders))

        def shown(what: str, work: Callable[[Contender], Run]) -> Callable[[Contender], Run]:
            def run(contender: Contender) -> Run:
                progress(f"{where}: {what} of {contender.name}")
                return work(contender)

            return run

        prefill = partial(measure.run_prefill, workload)
        prefills = measure.interleaved(self.contenders, self.rounds, shown("prefill", prefill))
        measured = [one for one in self.contenders if one.name in prefills.results]
        answers: Rounds[AnswerRun] = Rounds(warmup={}, results={}, failed={})
        if self.new_tokens and measured:
            answer = partial(measure.run_answer, workload, new_tokens=self.new_tokens)
            answers = measure.interleaved(measured, max(2, self.rounds // 2), shown("answer", answer))
        progress(f"{where}: cost of cuts and encoders")
        runs = PartRuns(
            workload=workload,
            rates=rates,
            rounds=self.rounds,
            new_tokens=self.new_tokens,
            prefills=prefills,
            answers=answers,
        )
        rows = [runs.row(contender) for contender in measured]
        encode = unless_refused(partial(probes.encoder_cost, workload, self.rounds))
        return {"encode": encode and asdict(encode), "rows": rows, "failed": {**prefills.failed, **answers.failed}}
