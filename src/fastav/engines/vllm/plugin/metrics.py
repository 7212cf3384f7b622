"""Numbers for operators, at vLLM's own `/metrics` and in its log.

Every request is counted in the process that it arrives in. Where vLLM has several such processes, its `/metrics` adds
the counters of all.
"""

import time
from collections import Counter as Tally
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakSet

from fastav.engines.vllm import compat
from fastav.engines.vllm.plugin.usage import PromptUsage
from fastav.flops import Saving

MAX_PLANS = 64  # plans with a label of their own, as clients choose the options of recipes
OTHERS = "other"
REASONS = ("plan", "prompt", "setting")


@cache
def _counters() -> dict[str, Any]:
    """The counters of this process, which all of its engines share."""
    from prometheus_client import Counter  # vLLM decides first whether several processes share the numbers

    def counter(name: str, text: str, *labels: str) -> Any:
        return Counter(f"fastav_{name}", text, ("model_name", *labels))

    return {
        "requests": counter("requests", "Prompts that the server took, by plan.", "plan"),
        "prompt_tokens": counter("prompt_tokens", "Tokens of prompts, by plan and modality.", "plan", "modality"),
        "kept_tokens": counter(
            "kept_tokens", "Tokens of prompts that the last layer keeps, by plan and modality.", "plan", "modality"
        ),
        "layer_tokens": counter(
            "layer_tokens", "Tokens that layers run on in prefills, with and without pruning.", "plan", "pruning"
        ),
        "flops": counter("prefill_flops", "FLOPs of prefills, with and without pruning.", "plan", "pruning"),
        "kv_bytes": counter(
            "kv_bytes", "Bytes of KV cache that prompts take, with and without pruning.", "plan", "pruning"
        ),
        "kv_blocks": counter(
            "kv_blocks", "Blocks of KV cache that prompts take, with and without pruning.", "plan", "pruning"
        ),
        "refused": counter("refused_requests", "Requests that fastav refused, by reason.", "reason"),
    }


@dataclass(kw_only=True)
class _Interval:
    """What came since the last line of the log."""

    plans: Tally[str] = field(default_factory=Tally)
    refused: int = 0
    prompt: Tally[str] = field(default_factory=Tally)
    kept: Tally[str] = field(default_factory=Tally)
    savings: dict[str, Saving] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)


class PruningMetrics:
    """The numbers of one server.  plan: the name of its own plan, whose counters exist from the start."""

    def __init__(self, model_name: str, plan: str) -> None:
        self._model, self._plans = model_name, {plan}
        self._interval = _Interval()
        for reason in REASONS:
            _counters()["refused"].labels(model_name, reason)
        _counters()["requests"].labels(model_name, plan)

    def admit(self, usage: PromptUsage, plan: str, answers: int) -> None:
        """Count a prompt.

        plan: the name that it is counted under. answers: their number; each has a prefill of its own.
        """
        plan, model, counters = self._label(plan), self._model, _counters()
        counters["requests"].labels(model, plan).inc()
        self._interval.plans[plan] += 1
        for name, tokens, tally in (
            ("prompt_tokens", usage.prompt_tokens, self._interval.prompt),
            ("kept_tokens", usage.tokens_per_layer[-1], self._interval.kept),
        ):
            for modality, count in tokens.items():
                counters[name].labels(model, plan, modality).inc(count * answers)
                tally[modality] += count * answers
        for name in ("layer_tokens", "flops", "kv_bytes", "kv_blocks"):
            saving: Saving = getattr(usage, name)
            counters[name].labels(model, plan, "full").inc(saving.full * answers)
            counters[name].labels(model, plan, "pruned").inc(saving.pruned * answers)
            before = self._interval.savings.get(name, Saving(0, 0))
            self._interval.savings[name] = Saving(
                before.full + saving.full * answers, before.pruned + saving.pruned * answers
            )

    def refuse(self, reason: str) -> None:
        """Count a request that is refused.  reason: one of `REASONS`."""
        _counters()["refused"].labels(self._model, reason).inc()
        self._interval.refused += 1

    def line(self) -> str | None:
        """A line about what came since the last one; None if nothing did."""
        ended, self._interval = self._interval, _Interval()
        if not ended.plans and not ended.refused:
            return None
        parts = [f"fastav: {sum(ended.plans.values())} prompts in {time.monotonic() - ended.start:.0f} s"]
        if ended.plans:
            parts[0] += f" ({', '.join(f'{plan} {count}' for plan, count in ended.plans.most_common(4))})"
            prompt = ", ".join(f"{kind} {count:,}" for kind, count in ended.prompt.items())
            kept = ", ".join(f"{kind} {count:,}" for kind, count in ended.kept.items())
            parts.append(f"tokens: {prompt}; in the last layer: {kept}")
            shares = {"FLOPs of prefills": "flops", "KV blocks": "kv_blocks"}
            parts += [f"{text}: {ended.savings[name].ratio:.0%} of unpruned" for text, name in shares.items()]
        parts.append(f"refused: {ended.refused}")
        return "; ".join(parts)

    def _label(self, plan: str) -> str:
        if plan not in self._plans and len(self._plans) >= MAX_PLANS:
            return OTHERS
        self._plans.add(plan)
        return plan


_logged: WeakSet[PruningMetrics] = WeakSet()


def log_periodically(metrics: PruningMetrics) -> None:
    """Log a line about these numbers whenever vLLM logs its own, as long as they are in use."""
    _logged.add(metrics)


def log_with(log: Any) -> Any:
    """Wrap vLLM's method that logs its periodic line, to log ours after it."""

    def wrapper(self: Any) -> None:
        log(self)
        for metrics in _logged:
            if (line := metrics.line()) is not None:
                compat.init_logger("vllm.fastav").info("%s", line)

    return wrapper
