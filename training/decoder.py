"""Training of the decoder and the projectors on answers. The encoders stay frozen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fastav.models.videollama2 import Scheme, VideoLlama2ForConditionalGeneration, VideoLlama2Processor
from training import attention
from training.data import Bank, Batch, before, pack
from training.optimizers import optimizers, rate, step
from training.progress import Progress
from training.world import Phase, World

AT_ONCE = 10  # scenes, when the training is evaluated


def phase_of(phases: Sequence[Phase], step: int) -> tuple[Phase, int]:
    """The phase of a step, and the index of the step within it."""
    for phase in phases:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise IndexError("there are no more steps")


@dataclass(frozen=True, slots=True)
class Shown:
    """A bank, how its clips become tokens, and their features from both encoders: [pictures or sounds, tokens, width].

    words: which of `World.align_words` describe each token, two bool tensors [pictures or sounds, tokens, words]; None
    if tokens are not aligned with words.
    """

    bank: Bank
    scheme: Scheme
    seen: Tensor
    heard: Tensor
    words: tuple[Tensor, Tensor] | None = None

    @property
    def tokens(self) -> int:
        """The number of audio and video tokens of one clip."""
        return self.seen.shape[1] + self.heard.shape[1]

    def order(self, interleaved: bool) -> np.ndarray:
        """The order of a prompt's media tokens, as indices of its video tokens followed by its audio tokens."""
        return replace(self.scheme, interleaved=interleaved).order(self.seen.shape[1], self.heard.shape[1])


class Lessons:
    """The training of the decoder: the model, its optimizers, and the current step.  shown: clips of each length."""

    def __init__(
        self,
        model: VideoLlama2ForConditionalGeneration,
        processor: VideoLlama2Processor,
        world: World,
        shown: Sequence[Shown],
        seed: int,
    ) -> None:
        self.model, self.processor, self.world, self.shown, self.seed = model, processor, world, shown, seed
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
        return sum(phase.steps for phase in self.world.phases)

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
        means = [0.0] * len(self.shown)
        while self.step < self.steps:
            phase, within = phase_of(self.world.phases, self.step)
            length, batch = self._batch(self.step)
            with torch.autocast(self.model.device.type, torch.bfloat16):
                loss = self._loss(self.shown[length], batch, phase.aligned)
            step(loss, self.optimizers, phase.peak * rate(within, phase.steps, phase.held))
            means[length] += 0.1 * (float(loss.detach()) - means[length])
            progress.tell(self.step, "loss " + ", ".join(f"{mean:.3f}" for mean in means if mean))
            self.step += 1
            if self.step % every == 0 or self.step == self.steps:
                then()
        self.model.config._attn_implementation = before_us

    def _batch(self, number: int) -> tuple[int, Batch]:
        """The length of the clips of a step, as an index of the world's, and its batch."""
        phase, within = phase_of(self.world.phases, number)
        length = phase.turns[within % len(phase.turns)]
        shown = self.shown[length]
        rng = np.random.default_rng((self.seed, number))
        scenes = shown.bank.scenes(self.world.scenes[length], rng, held_out=False)
        asked = [self.world.kinds(phase, rng, shown.bank.seconds) for _ in scenes]
        return length, pack(self.processor, shown.bank, scenes, asked, self._start(shown), rng)

    def _start(self, shown: Shown) -> int:
        """The position after the clip."""
        return len(self.prefix) + shown.tokens

    def _loss(self, shown: Shown, batch: Batch, aligned: float | int) -> Tensor:
        """The loss of the current step.  aligned: weight of the loss of words for the tokens of clips."""
        weights, targets = (part.to(self.model.device) for part in (batch.weights, batch.targets))
        video, audio = self._media(shown, batch, self.world.noise)
        # turns of layouts and of lengths both repeat, so a layout lasts longer than one round of lengths
        interleaved = self.world.interleaved and self.step // 4 % 2 == 1
        logits = self._logits(shown, batch, video, audio, interleaved)[weights > 0].float()
        losses = cross_entropy(logits, targets[weights > 0], reduction="none")
        loss = (losses * weights[weights > 0]).sum() / weights.sum()
        return loss + aligned * self._misalignment(shown, batch, video, audio) if aligned else loss

    def _media(self, shown: Shown, batch: Batch, noise: float | int = 0) -> tuple[Tensor, Tensor]:
        """The embeddings of video and audio tokens, from features with this share of noise."""
        body, device = self.model.model, self.model.device
        make = torch.Generator().manual_seed(self.step)
        found = []
        for features, project in (
            (shown.seen[batch.pictures], body.mm_projector.readout),
            (shown.heard[batch.sounds], body.mm_projector_a),
        ):
            features = features.float()
            if noise:
                features = features + noise * features.std() * torch.randn(features.shape, generator=make)
            found.append(project(features.to(device)))
        video, audio = found
        return video, audio

    def _misalignment(self, shown: Shown, batch: Batch, video: Tensor, audio: Tensor) -> Tensor:
        """How unlike the words for what they show the embeddings of media tokens are."""
        assert shown.words is not None
        words = self.processor.tokenizer.convert_tokens_to_ids(list(self.world.align_words))
        known = self.model.model.embed_tokens.weight[words]
        losses = []
        for tokens, told in zip((video, audio), shown.words, strict=True):
            wanted = told[batch.pictures if tokens is video else batch.sounds].to(tokens.device)
            describes = wanted.any(-1)
            likely = linear(tokens[describes], known).float().log_softmax(-1)
            wanted = wanted[describes].float()
            losses.append(-(likely * wanted).sum(-1).div(wanted.sum(-1)).mean())
        return losses[0] + losses[1]

    def _logits(
        self, shown: Shown, batch: Batch, video: Tensor, audio: Tensor, interleaved: bool = False
    ) -> Float[Tensor, "scenes tokens vocabulary"]:
        """Logits of the tokens after the clips.  video, audio: embeddings."""
        body, device = self.model.model, self.model.device
        rows = len(batch.ids)
        front, questions = body.embed_tokens(self.prefix).expand(rows, -1, -1), body.embed_tokens(batch.ids.to(device))
        media = torch.cat([video.to(front), audio.to(front)], 1)
        if interleaved:
            media = media[:, torch.from_numpy(shown.order(interleaved)).to(device)]
        embeddings = torch.cat([front, media, questions], 1)
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
    def right(self, shown: Shown, scenes: int, interleaved: bool = False) -> dict[str, float]:
        """The share of right answers by group of questions, on held-out scenes.  Every token must be right."""
        before_us = self.model.config._attn_implementation
        self.model.config._attn_implementation = attention.NAME
        rng = np.random.default_rng(self.seed)
        kinds = self.world.all_kinds(shown.bank.seconds)
        found = shown.bank.scenes(scenes, rng, held_out=True)
        answers: dict[str, list[bool]] = {kind: [] for kind in kinds}
        for first in range(0, scenes, AT_ONCE):
            some = found[first : first + AT_ONCE]
            batch = pack(self.processor, shown.bank, some, [kinds] * len(some), self._start(shown), rng)
            with torch.autocast(self.model.device.type, torch.bfloat16):
                said = self._logits(shown, batch, *self._media(shown, batch), interleaved).argmax(-1).cpu()
            correct = (said == batch.targets) | (batch.weights == 0)
            for row, asked in enumerate(batch.asked):
                for number, question in asked.items():
                    whole = bool(correct[row, batch.questions[row] == number].all())
                    for group in self.world.groups(question):
                        answers.setdefault(group, []).append(whole)
        self.model.config._attn_implementation = before_us
        return {group: sum(told) / len(told) for group, told in answers.items() if told}
