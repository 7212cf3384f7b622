"""Answers under plans, measured against the unpruned model's, a batch of questions at a time."""

from collections.abc import Mapping, Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor

from fastav.agreement import Agreement
from fastav.batches import attempt
from fastav.decoding.settings import greedy_settings
from fastav.engine import Answer, Engine
from fastav.errors import FastAVError
from fastav.evaluate.divergence import Divergence
from fastav.layout import MEDIA
from fastav.plan import Plan
from fastav.presets import NONE
from fastav.request import Request
from fastav.verify.rows import Compared, Measured

Outcome = tuple[Measured, dict[str, Compared]]  # the unpruned answer, and each plan's


def measure(
    engine: Engine, plans: Mapping[str, Plan], requests: Sequence[Request], max_new_tokens: int
) -> list[Outcome | FastAVError]:
    """The answers to a batch of requests, unpruned and under every plan.

    A batch in which something fails is measured again request by request. An error is the outcome of a request that has
    no unpruned answer; a plan that fails has its error.
    Raises: as `fastav.batches.attempt`.
    """
    outcome = attempt(partial(_measure_batch, engine, plans, requests, max_new_tokens))
    failed = isinstance(outcome, FastAVError) or any(
        compared.error is not None for _, by_plan in outcome for compared in by_plan.values()
    )
    if failed and len(requests) > 1:
        return [one for request in requests for one in measure(engine, plans, [request], max_new_tokens)]
    return [outcome] if isinstance(outcome, FastAVError) else list(outcome)


def _measure_batch(
    engine: Engine, plans: Mapping[str, Plan], requests: Sequence[Request], max_new_tokens: int
) -> list[Outcome]:
    unpruned = _greedy(engine, requests, NONE, max_new_tokens)
    logits = engine.forced_logits(requests, NONE, [answer.token_ids for answer in unpruned])
    by_plan: dict[str, list[Compared]] = {}
    for name, plan in plans.items():
        outcome = attempt(partial(_compare, engine, plan, requests, max_new_tokens, unpruned, logits))
        if isinstance(outcome, FastAVError):
            outcome = [Compared(error=one_line(outcome)) for _ in requests]
        by_plan[name] = outcome
    return [
        (_measured(answer), {name: rows[index] for name, rows in by_plan.items()})
        for index, answer in enumerate(unpruned)
    ]


def _compare(
    engine: Engine,
    plan: Plan,
    requests: Sequence[Request],
    max_new_tokens: int,
    unpruned: Sequence[Answer],
    logits: Sequence[Float[Tensor, "steps vocabulary"]],
) -> list[Compared]:
    answers = _greedy(engine, requests, plan, max_new_tokens)
    pruned_logits = engine.forced_logits(requests, plan, [answer.token_ids for answer in unpruned])
    return [
        _compared(*pair, Divergence.of(pair[0], first, second))
        for pair, first, second in zip(zip(unpruned, answers, strict=True), logits, pruned_logits, strict=True)
    ]


def _greedy(engine: Engine, requests: Sequence[Request], plan: Plan, max_new_tokens: int) -> tuple[Answer, ...]:
    return engine.generate(requests, plan, **greedy_settings(), max_new_tokens=max_new_tokens)


def _compared(unpruned: Answer, pruned: Answer, divergence: Divergence) -> Compared:
    agreement = Agreement.of(pruned.text, pruned.token_ids, unpruned.text, unpruned.token_ids)
    return Compared(
        answer=_measured(pruned),
        exact=agreement.exact,
        first_token=agreement.first_token,
        rouge_l=agreement.rouge_l,
        kl={"mean": divergence.mean, "max": divergence.max},
    )


def _measured(answer: Answer) -> Measured:
    return Measured(
        text=answer.text,
        finish=answer.finish,
        new_tokens=len(answer.token_ids),
        prompt_tokens=dict(answer.prompt_tokens),
        kept=kept_shares(answer),
        flops={"full": answer.flops.full, "pruned": answer.flops.pruned},
        kv_bytes={"full": answer.kv_bytes.full, "pruned": answer.kv_bytes.pruned},
        seconds=dict(answer.seconds),
        peak_bytes=answer.peak_bytes,
    )


def kept_shares(answer: Answer) -> dict[str, float]:
    """The share of each medium's tokens that a layer runs on, mean over layers; of `media` together."""
    totals = {m.label: answer.prompt_tokens[m.label] for m in MEDIA if answer.prompt_tokens.get(m.label)}
    layers = answer.tokens_per_layer
    sums = {name: sum(layer.get(name, 0) for layer in layers) for name in totals}
    shares = {name: sums[name] / (len(layers) * total) for name, total in totals.items()}
    whole = len(layers) * sum(totals.values())
    return shares | ({"media": sum(sums.values()) / whole} if whole else {})


def one_line(error: FastAVError) -> str:
    """The message of an error with its hint, on one line."""
    return " ".join(str(error).split())
