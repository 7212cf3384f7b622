"""Training of the decoder and the projectors on answers. The encoders stay frozen."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fastav.models.videollama2 import VideoLlama2ForConditionalGeneration, VideoLlama2Processor
from fastav.world import kinds
from training import attention
from training.data import FACTS, Bank, Batch, Phase, before, pack
from training.optimizers import optimizers, rate, step
from training.progress import Progress

BRIDGES = ("fits", "sound-of", "shape-of")
PHASES = (
    # all facts, and questions that compare two of them
    Phase(steps=240, asked=(*FACTS, "see", "is", "hear", "fits", "caption"), facts=0, peak=1, held=1),
    # what takes long to learn: comparing shape and sound, or question and clip
    Phase(steps=1200, asked=(*BRIDGES, "hear", *("see",) * 4, *("is",) * 3, "rest"), facts=3, peak=0.5, held=0.5),
    # everything, and long clips
    Phase(steps=400, asked=(*BRIDGES, "hear", *("see",) * 2, *("is",) * 2), facts=8, peak=0.5, held=0.2, long=True),
)
SCENES, LONG_SCENES = 16, 4


def phase_of(step: int) -> tuple[Phase, int]:
    """The phase of a step, and the index of the step within it."""
    for phase in PHASES:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise IndexError("there are no more steps")


@dataclass(frozen=True, slots=True)
class Shown:
    """A bank and its features from both encoders: [pictures or sounds, tokens, width]."""

    bank: Bank
    seen: Tensor
    heard: Tensor

    @property
    def tokens(self) -> int:
        """The number of audio and video tokens of one clip."""
        return self.seen.shape[1] + self.heard.shape[1]


class Lessons:
    """The training of the decoder: the model, its optimizers, and the current step."""

    def __init__(
        self,
        model: VideoLlama2ForConditionalGeneration,
        processor: VideoLlama2Processor,
        shown: Shown,
        long: Shown,
        seed: int,
    ) -> None:
        self.model, self.processor, self.shown, self.long, self.seed = model, processor, shown, long, seed
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
        """The number of steps of all phases."""
        return sum(phase.steps for phase in PHASES)

    def state(self) -> dict[str, object]:
        """The content of a checkpoint."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"step": self.step, "model": self.model.state_dict(), "optimizers": states}

    def resume(self, state: dict) -> None:
        """Restore the content of a checkpoint."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def run(self, every: int, then: Callable[[], None]) -> None:
        """Run the remaining steps; call `then` after every `every` steps and at the end."""
        before_us = self.model.config._attn_implementation
        self.model.config._attn_implementation = attention.NAME
        progress = Progress("decoder", self.steps, self.step)
        means = {False: 0.0, True: 0.0}
        while self.step < self.steps:
            phase, within = phase_of(self.step)
            shown, batch = self._batch(self.step)
            long = shown is self.long
            with torch.autocast(self.model.device.type, torch.bfloat16):
                loss = self._loss(shown, batch)
            step(loss, self.optimizers, phase.peak * rate(within, phase.steps, phase.held))
            means[long] += 0.1 * (float(loss.detach()) - means[long])
            progress.tell(
                self.step, f"loss {means[False]:.3f}" + f", {means[True]:.3f} of long clips" * (means[True] > 0)
            )
            self.step += 1
            if self.step % every == 0 or self.step == self.steps:
                then()
        self.model.config._attn_implementation = before_us

    def _batch(self, number: int) -> tuple[Shown, Batch]:
        """The features and the batch of a step."""
        phase, within = phase_of(number)
        shown, count = (self.long, LONG_SCENES) if phase.long and within % 2 else (self.shown, SCENES)
        rng = np.random.default_rng((self.seed, number))
        scenes = shown.bank.scenes(count, rng, held_out=False)
        asked = [phase.kinds(rng, shown.bank.seconds) for _ in scenes]
        return shown, pack(self.processor, shown.bank, scenes, asked, self._start(shown), rng)

    def _start(self, shown: Shown) -> int:
        """The position after the clip."""
        return len(self.prefix) + shown.tokens

    def _loss(self, shown: Shown, batch: Batch) -> Tensor:
        weights, targets = (part.to(self.model.device) for part in (batch.weights, batch.targets))
        logits = self._logits(shown, batch)[weights > 0].float()
        losses = cross_entropy(logits, targets[weights > 0], reduction="none")
        return (losses * weights[weights > 0]).sum() / weights.sum()

    def _logits(self, shown: Shown, batch: Batch) -> Float[Tensor, "scenes tokens vocabulary"]:
        """Logits of the tokens after the clips."""
        body, device = self.model.model, self.model.device
        rows = len(batch.ids)
        video = body.mm_projector.readout(shown.seen[batch.pictures].to(device).float())
        audio = body.mm_projector_a(shown.heard[batch.sounds].to(device).float())
        front, questions = body.embed_tokens(self.prefix).expand(rows, -1, -1), body.embed_tokens(batch.ids.to(device))
        embeddings = torch.cat([front, video.to(front), audio.to(front), questions], 1)
        start = self._start(shown)
        positions = torch.arange(start).expand(rows, -1)
        positions = torch.cat([positions, batch.positions], 1).to(device)
        mask = torch.zeros(rows, 1, batch.ids.shape[1], positions.shape[1], dtype=torch.bfloat16)
        mask[:, 0, :, start:].masked_fill_(~batch.sees, attention.HIDDEN)
        hidden = body(
            inputs_embeds=embeddings,
            attention_mask={"full_attention": mask.to(device)},
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return linear(hidden[:, start:], body.embed_tokens.weight)

    @torch.no_grad()
    def right(self, shown: Shown, scenes: int) -> Iterator[tuple[str, float]]:
        """The share of right answers by kind of question, on held-out scenes.  Every token must be right."""
        before_us = self.model.config._attn_implementation
        self.model.config._attn_implementation = attention.NAME
        rng = np.random.default_rng(self.seed)
        asked = kinds(shown.bank.seconds)
        found = shown.bank.scenes(scenes, rng, held_out=True)
        batch = pack(self.processor, shown.bank, found, [asked] * scenes, self._start(shown), rng)
        with torch.autocast(self.model.device.type, torch.bfloat16):
            said = self._logits(shown, batch).argmax(-1).cpu()
        self.model.config._attn_implementation = before_us
        for number, kind in enumerate(asked):
            here = (batch.questions == number) & (batch.weights > 0)
            whole = ((said == batch.targets) | ~here).all(1)
            yield kind, float(whole.float().mean())
