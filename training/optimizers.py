"""Muon for the matrices of the layers, AdamW for everything else, and the schedule of their learning rates."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

WARM_UP = 40  # steps


def optimizers(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Optimizer]:
    """The two optimizers for these named parameters."""
    named = dict(parameters)
    matrices = {n: p for n, p in named.items() if p.ndim == 2 and "layers." in n and "bias" not in n}
    others = [p for n, p in named.items() if n not in matrices]
    found: list[Optimizer] = [torch.optim.Muon([*matrices.values()], lr=0.02, weight_decay=0.02, momentum=0.95)]
    found.append(torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["full"] = group["lr"]
    return found


def step(loss: torch.Tensor, found: Sequence[Optimizer], rate: float) -> None:
    """Take one optimizer step on `loss`, at this share of the full learning rates."""
    for optimizer in found:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in found:
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * rate
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()


def rate(step: int, steps: int, held: float) -> float:
    """The share of the full learning rate: warm-up, full until a share `held` of the steps, then linear decay."""
    down = max(0.0, step / steps - held) / max(1 - held, 1e-9)
    return min(1.0, (step + 1) / WARM_UP) * max(0.02, 1 - down)
