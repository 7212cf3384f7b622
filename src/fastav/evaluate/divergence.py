"""The Kullback-Leibler divergence of two models' next-token distributions along an answer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastav.engine import Answer
from fastav.errors import FastAVError

CHUNK = 16  # distributions in float64 at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """KL(unpruned || pruned) in nats along an answer of the unpruned model: its mean over tokens, and the largest."""

    mean: float
    max: float

    @classmethod
    def of(
        cls,
        answer: Answer,
        unpruned: Float[Tensor, "steps vocabulary"],
        pruned: Float[Tensor, "steps vocabulary"],
    ) -> "Divergence":
        """From the logits that both compute along the unpruned answer, as `Engine.forced_logits` returns them.

        The tokens of the answer count, and the end marker if it ended.
        Raises: FastAVError if logits are not finite.
        """
        decisions = len(answer.token_ids) + (answer.finish == "stop")
        values = kl_divergence(unpruned[:decisions], pruned[:decisions])
        return cls(mean=float(values.mean()), max=float(values.max()))


def kl_divergence(
    first: Float[Tensor, "steps vocabulary"], second: Float[Tensor, "steps vocabulary"]
) -> Float[Tensor, " steps"]:
    """KL(first || second) in nats of the distributions with these logits, in float64, a few steps at a time.

    A logit of -inf is a probability of 0.
    Raises: FastAVError if a divergence is not a finite number.
    """
    pairs = zip(first.split(CHUNK), second.split(CHUNK), strict=True)
    values = torch.cat([_chunk(*pair) for pair in pairs])
    if not values.isfinite().all():
        raise FastAVError(
            "the divergence is not finite: logits overflow, or the pruned model rules out a token that the unpruned "
            "one can choose",
            "try --dtype float32 or bfloat16",
        )
    return values


def _chunk(first: Tensor, second: Tensor) -> Tensor:
    p, q = (logits.double().log_softmax(-1) for logits in (first, second))
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp(min=0)  # only rounding makes it negative
