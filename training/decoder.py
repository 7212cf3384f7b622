"""Then, the decoder learns to answer, with the projectors; the encoders stay as they are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fastav.models.videollama2 import VideoLlama2ForConditionalGeneration, VideoLlama2Processor
from fastav.world import KINDS
from training import attention
from training.data import Bank, Batch, before, kinds_of, pack
from training.optimizers import optimizers, rate, step
from training.progress import Progress

PHASES = ((180, 1.0), (900, 0.4), (420, 0.5), (300, 0.3))
"""Steps of each phase, and for what share of them the rate is full before it falls."""
SCENES = 16


def phase_of(step: int) -> tuple[int, int, tuple[int, float]]:
    """Which phase a step is in, how many steps of it came before, and what `PHASES` says of it."""
    for number, phase in enumerate(PHASES):
        if step < phase[0]:
            return number, step, phase
        step -= phase[0]
    raise IndexError("there are no more steps")


@dataclass(frozen=True, slots=True)
class Shown:
    """A bank and what the encoders make of it: [pictures or sounds, tokens, width]."""

    bank: Bank
    seen: Tensor
    heard: Tensor


class Lessons:
    """The model, its optimizers, and the step they are at."""

    def __init__(
        self, model: VideoLlama2ForConditionalGeneration, processor: VideoLlama2Processor, shown: Shown, seed: int
    ) -> None:
        self.model, self.processor, self.shown, self.seed = model, processor, shown, seed
        self.prefix = torch.tensor(before(processor), device=model.device)
        body = model.model
        learning = (body.embed_tokens, body.layers, body.norm, body.mm_projector.readout, body.mm_projector_a)
        named = [
            (f"{part}.{'layers.' if part == 1 else ''}{name}", parameter)
            for part, module in enumerate(learning)
            for name, parameter in module.named_parameters()
        ]
        self.optimizers = optimizers(named)
        self.step = 0

    @property
    def steps(self) -> int:
        """How many there are."""
        return sum(steps for steps, _ in PHASES)

    def state(self) -> dict[str, object]:
        """What a checkpoint holds."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"step": self.step, "model": self.model.state_dict(), "optimizers": states}

    def resume(self, state: dict) -> None:
        """From a checkpoint."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def run(self, every: int, then: Callable[[], None]) -> None:
        """All steps that are left; `then` is called every so many and at the end."""
        before_us = self.model.config._attn_implementation
        self.model.config._attn_implementation = attention.NAME
        progress = Progress("decoder", self.steps, self.step)
        mean = 0.0
        while self.step < self.steps:
            batch = self._batch(self.step)
            with torch.autocast(self.model.device.type, torch.bfloat16):
                loss = self._loss(batch)
            _, within, (steps, held) = phase_of(self.step)
            step(loss, self.optimizers, rate(within, steps, held))
            mean += 0.1 * (float(loss.detach()) - mean)
            progress.tell(self.step, f"loss {mean:.3f}")
            self.step += 1
            if self.step % every == 0 or self.step == self.steps:
                then()
        self.model.config._attn_implementation = before_us

    def _batch(self, number: int) -> Batch:
        rng = np.random.default_rng((self.seed, number))
        scenes = self.shown.bank.scenes(SCENES, rng, held_out=False)
        phase, _, _ = phase_of(number)
        return pack(self.processor, self.shown.bank, scenes, [kinds_of(phase, rng) for _ in scenes], self._start, rng)

    @property
    def _start(self) -> int:
        """Where the clip ends."""
        return len(self.prefix) + self.shown.seen.shape[1] + self.shown.heard.shape[1]

    def _loss(self, batch: Batch) -> Tensor:
        weights, targets = (part.to(self.model.device) for part in (batch.weights, batch.targets))
        logits = self._logits(self.shown, batch)[weights > 0].float()
        losses = cross_entropy(logits, targets[weights > 0], reduction="none")
        return (losses * weights[weights > 0]).sum() / weights.sum()

    def _logits(self, shown: Shown, batch: Batch) -> Float[Tensor, "scenes tokens vocabulary"]:
        """Of the tokens behind the clips."""
        body, device = self.model.model, self.model.device
        rows = len(batch.ids)
        video = body.mm_projector.readout(shown.seen[batch.pictures].to(device).float())
        audio = body.mm_projector_a(shown.heard[batch.sounds].to(device).float())
        front, questions = body.embed_tokens(self.prefix).expand(rows, -1, -1), body.embed_tokens(batch.ids.to(device))
        embeddings = torch.cat([front, video.to(front), audio.to(front), questions], 1)
        positions = torch.arange(self._start).expand(rows, -1)
        positions = torch.cat([positions, batch.positions], 1).to(device)
        mask = torch.zeros(rows, 1, batch.ids.shape[1], positions.shape[1], dtype=torch.bfloat16)
        mask[:, 0, :, self._start :].masked_fill_(~batch.sees, attention.HIDDEN)
        hidden = body(
            inputs_embeds=embeddings,
            attention_mask={"full_attention": mask.to(device)},
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return linear(hidden[:, self._start :], body.embed_tokens.weight)

    @torch.no_grad()
    def right(self, shown: Shown, scenes: int) -> Iterator[tuple[str, float]]:
        """The share of first words of answers that are right, by kind, on held-out scenes."""
        before_us = self.model.config._attn_implementation
        self.model.config._attn_implementation = attention.NAME
        rng = np.random.default_rng(self.seed)
        kinds = list(KINDS)
        found = shown.bank.scenes(scenes, rng, held_out=True)
        batch = pack(self.processor, shown.bank, found, [kinds] * scenes, self._start, rng)
        with torch.autocast(self.model.device.type, torch.bfloat16):
            said = self._logits(shown, batch).argmax(-1).cpu()
        self.model.config._attn_implementation = before_us
        for number, kind in enumerate(kinds):
            here = (batch.questions == number) & (batch.weights > 0)
            whole = ((said == batch.targets) | ~here).all(1)
            yield kind, float(whole.float().mean())
