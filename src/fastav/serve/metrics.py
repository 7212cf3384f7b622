"""Numbers for operators, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastav.engine import Answer
from fastav.serve.scheduler import BatchReport, Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "fastav_requests", "Requests, by path and status.", ("path", "status"), registry=registry
        )
        self._seconds = Histogram(
            "fastav_request_seconds",
            "Seconds from a request to the end of its response.",
            ("path",),
            buckets=SECONDS,
            registry=registry,
        )
        self.first_text = Histogram(
            "fastav_time_to_first_text_seconds",
            "Seconds from a request to the first text of its answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self._phases = Counter("fastav_phase_seconds", "Seconds of answers, by phase.", ("phase",), registry=registry)
        self._batches = Histogram(
            "fastav_batch_size", "Answers of a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self._running = Counter("fastav_model_seconds", "Seconds in which the model ran.", registry=registry)
        self._prompt = Counter(
            "fastav_prompt_tokens", "Tokens of prompts, by modality.", ("modality",), registry=registry
        )
        self._new = Counter("fastav_completion_tokens", "Tokens of answers.", registry=registry)
        self._layer = Counter(
            "fastav_layer_tokens",
            "Tokens that layers ran on in prefills; and would have without pruning.",
            ("pruning",),
            registry=registry,
        )
        self._flops = Counter(
            "fastav_prefill_flops", "FLOPs of prefills, with and without pruning.", ("pruning",), registry=registry
        )
        self._kv = Counter(
            "fastav_kv_bytes",
            "Bytes of KV caches after prefills, with and without pruning.",
            ("pruning",),
            registry=registry,
        )
        self._admitted = Gauge("fastav_answers_admitted", "Answers that clients wait for.", registry=registry)
        self._waiting = Gauge("fastav_answers_waiting", "Of these, those that wait for the model.", registry=registry)

    def watch(self, scheduler: Scheduler) -> None:
        """Read the length of the queue when asked."""
        self._admitted.set_function(lambda: scheduler.admitted)
        self._waiting.set_function(lambda: scheduler.waiting)

    def response(self, path: str, status: int, seconds: float) -> None:
        """Count a response.  path: of its route. status: 0 if the client left before."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, report: BatchReport) -> None:
        """Count a batch."""
        self._batches.observe(report.size)
        self._running.inc(report.seconds)

    def answer(self, answer: Answer) -> None:
        """Count an answer and what its plan saved."""
        prompt = sum(answer.prompt_tokens.values())
        for modality, tokens in answer.prompt_tokens.items():
            self._prompt.labels(modality).inc(tokens)
        for phase, seconds in answer.seconds.items():
            self._phases.labels(phase).inc(seconds)
        self._new.inc(len(answer.token_ids))
        self._layer.labels("pruned").inc(sum(sum(layer.values()) for layer in answer.tokens_per_layer))
        self._layer.labels("full").inc(prompt * len(answer.tokens_per_layer))
        for counter, saving in ((self._flops, answer.flops), (self._kv, answer.kv_bytes)):
            counter.labels("pruned").inc(saving.pruned)
            counter.labels("full").inc(saving.full)

    def text(self) -> bytes:
        """All numbers."""
        return generate_latest(self._registry)
