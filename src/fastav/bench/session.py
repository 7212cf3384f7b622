"""One benchmark: what was asked, checked before any weight is made, and then its report."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastav.bench import contenders, limits, report, targets
from fastav.bench.subjects import Prompt, Subject, prompts, subject
from fastav.bench.suite import Suite, described
from fastav.bench.workload import build_model
from fastav.device import placed
from fastav.errors import FastAVError


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What will be measured.  skipped: what is not, and why."""

    subject: Subject
    prompts: tuple[Prompt, ...]
    batches: Sequence[int]
    contenders: tuple[contenders.Contender, ...]
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
        """Of what a user asks for; None stands for what is usual on the device.

        Raises: FastAVError and its kin for whatever cannot be measured.
        """
        if tokens and seconds:
            raise FastAVError("--tokens and --seconds are two ways to say how long a prompt is", "give one of them")
        place, kind = placed(device, dtype)
        gpu = place.type == "cuda"
        of = subject(model)
        asked = prompts(of, tokens=tokens, seconds=seconds)
        kinds, missing = contenders.attentions(attentions, place)
        found, refused = contenders.plans(of, plans, asked, kinds[0])
        return cls(
            subject=of,
            prompts=asked,
            batches=list(batches),
            contenders=contenders.contenders(found, kinds, compiled=compiled),
            skipped=missing | refused,
            device=place,
            dtype=getattr(torch, kind),
            rounds=rounds if rounds is not None else 12 if gpu else 5,
            new_tokens=new_tokens if new_tokens is not None else 32 if gpu else 0,
            threads=threads,
            commit=commit,
            arguments=arguments,
        )

    @property
    def file(self) -> str:
        """What the report's file is called: by model, prompts and device."""
        lengths = [prompt.name for prompt in self.prompts if prompt.name != "example"]
        return "-".join(["speed", self.subject.name, *lengths, self.device.type]) + ".json"

    @torch.inference_mode()
    def run(
        self,
        out: Path | None = None,
        *,
        say: Callable[[str], Any] | None = None,
        progress: Callable[[str], Any] | None = None,
    ) -> dict[str, Any]:
        """Measure, and return the report.

        out: folder that the report is written to after every part, so that what was measured survives what comes next.
        say: called with the heading, and with the table of every part. progress: called with what is being done.
        Raises: FastAVError if the weights do not fit, or nothing at all could be measured.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        gc.collect()
        gc.freeze()  # what is there already is looked at no more, so that collecting before every run is quick
        try:
            return self._run(out, say or (lambda _: None), progress or (lambda _: None))
        finally:
            gc.unfreeze()
            torch.set_num_threads(threads)

    def _run(self, out: Path | None, say: Callable[[str], Any], progress: Callable[[str], Any]) -> dict[str, Any]:
        progress("how fast this machine multiplies and copies")
        rates = limits.rates(self.device, self.dtype)
        progress(f"building {self.subject.name}")
        model = build_model(self.subject, self.device, self.dtype)
        suite = Suite(
            name=self.subject.name,
            model=model,
            adapter=self.subject.adapter,
            contenders=self.contenders,
            prompts=self.prompts,
            batches=self.batches,
            rounds=self.rounds,
            new_tokens=self.new_tokens,
            rates=rates,
            progress=progress,
        )
        found = self._heading(model, rates)
        say(report.heading(found))
        for part in suite.parts():
            for row in part["rows"]:
                row["targets"] = targets.judged(found, part, row)
            found["parts"].append(part)
            if out is not None:
                report.write(found, out / self.file)
            say(report.table(part))
        if not any(part["rows"] for part in found["parts"]):
            reasons = {reason for part in found["parts"] for reason in part["failed"].values()}
            raise FastAVError(f"nothing could be measured: {'; '.join(sorted(reasons))}", "try less")
        return found

    def _heading(self, model: Any, rates: limits.Rates) -> dict[str, Any]:
        weights = [*model.parameters(), *model.buffers()]
        return {
            "fastav_bench": report.FORMAT,
            **report.circumstances(self.arguments, self.device, self.commit),
            "model": self.subject.name,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "decoder": asdict(self.subject.adapter.shape(self.subject.config)),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "weight_bytes": sum(weight.untyped_storage().nbytes() for weight in weights),
            "rates": {"tflops": rates.flops / 1e12, "gb_per_second": rates.bytes / 1e9},
            "rounds": self.rounds,
            "new_tokens": self.new_tokens,
            "skipped": self.skipped,
            "plans": described(self.contenders),
            "parts": [],
        }
