"""Answers of the unpruned model and of a plan to the prompts of a calibration: how far they agree, and their times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fastav import statistics
from fastav.agreement import Agreement

ANSWERS = 64  # prompts that are answered, unless told otherwise
MAX_NEW_TOKENS = 64
FEW = 10  # pairs, below which medians of times are called noisy
PHASES = ("prefill", "decode", "decode_per_token")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPair:
    """Two answers to a prompt, one right after the other.

    clip: the name of its file. machine: that has answered, as in `fastav.provenance`. unpruned, pruned: the results of
    `fastav.Answer.to_dict`.
    """

    clip: str
    question: str
    machine: Mapping[str, Any]
    unpruned: Mapping[str, Any]
    pruned: Mapping[str, Any]

    @property
    def agreement(self) -> Agreement:
        """The pruned answer against the unpruned one."""
        pruned, unpruned = self.pruned, self.unpruned
        return Agreement.of(pruned["text"], pruned["token_ids"], unpruned["text"], unpruned["token_ids"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The answers of a calibration.

    pairs: in the order of the prompts. traced: the number of prompts that the plan was chosen from. max_new_tokens: of
    every answer. failures: clip, question and reason of the prompts that could not be answered.
    """

    pairs: tuple[AnswerPair, ...]
    traced: int
    max_new_tokens: int
    failures: tuple[tuple[str, str, str], ...] = ()

    def summary(self) -> dict[str, Any]:
        """Agreement, costs and times, ready for JSON; docs/calibrate.md defines them."""
        agreements = [pair.agreement for pair in self.pairs]
        times = [(phase_seconds(pair.unpruned), phase_seconds(pair.pruned)) for pair in self.pairs]
        return {
            "n": len(self.pairs),
            "prompts": self.traced,
            "max_new_tokens": self.max_new_tokens,
            "exact": statistics.share([float(one.exact) for one in agreements]),
            "first_token": statistics.share([float(one.first_token) for one in agreements]),
            "rouge_l": statistics.share([one.rouge_l for one in agreements]),
            "flops_ratio": self._mean_ratio("flops"),
            "kv_ratio": self._mean_ratio("kv_bytes"),
            "seconds": {
                name: {phase: _median([both[index].get(phase) for both in times]) for phase in PHASES}
                for index, name in enumerate(("unpruned", "pruned"))
            },
            "time_ratio": {phase: _ratio(times, phase) for phase in PHASES},
            "noisy": len(self.pairs) < FEW,
            "machines": self.machines(),
            "differences": [
                {
                    "clip": pair.clip,
                    "question": pair.question,
                    "unpruned": pair.unpruned["text"],
                    "pruned": pair.pruned["text"],
                    "first_token": agreement.first_token,
                    "rouge_l": agreement.rouge_l,
                }
                for pair, agreement in self.differences()
            ],
            "failures": [dict(zip(("clip", "question", "reason"), one, strict=True)) for one in self.failures],
        }

    def differences(self) -> list[tuple[AnswerPair, Agreement]]:
        """The pairs of answers that differ, those with the lowest ROUGE-L first."""
        found = [(pair, agreement) for pair in self.pairs if not (agreement := pair.agreement).exact]
        return sorted(found, key=lambda one: one[1].rouge_l)

    def machines(self) -> list[dict[str, Any]]:
        """The machines that have answered, each once."""
        machines: list[dict[str, Any]] = []
        for pair in self.pairs:
            if (machine := dict(pair.machine)) not in machines:
                machines.append(machine)
        return machines

    def _mean_ratio(self, cost: str) -> float | None:
        ratios = [float(pair.pruned[cost]["ratio"]) for pair in self.pairs]
        return statistics.mean(ratios) if ratios else None


def phase_seconds(answer: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of an answer by phase.

    `decode` and `decode_per_token` are missing if the prefill gave the only token. The end marker is a token, too.
    """
    seconds, finish, n_tokens = answer["seconds"], answer["finish"], len(answer["token_ids"])
    steps = n_tokens - 1 if finish == "length" else n_tokens
    decode = float(seconds["decode"])
    decoding = {"decode": decode, "decode_per_token": decode / steps} if steps > 0 else {}
    return {"prefill": float(seconds["prefill"]), **decoding}


def evenly_spread(items: Sequence[T], number: int) -> list[T]:
    """So many of the items, evenly spread; all, if there are no more."""
    indices = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[index] for index in indices]


def _ratio(times: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], phase: str) -> dict[str, Any] | None:
    """Over pairs: median and quartiles of pruned over unpruned seconds, of the `n` pairs in which both are known."""
    ratios = [pruned[phase] / full[phase] for full, pruned in times if phase in pruned and full.get(phase, 0) > 0]
    if not ratios:
        return None
    low, middle, high = (float(value) for value in np.quantile(ratios, (0.25, 0.5, 0.75)))
    return {"n": len(ratios), "median": middle, "quartiles": [low, high]}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
