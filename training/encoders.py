"""Training of the encoders on the labels of their tokens, before they are frozen and their features stored."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastav.models.videollama2 import VideoLlama2Model
from training import attention
from training.data import Labelled, pixels, render
from training.optimizers import optimizers, rate, step
from training.progress import Progress
from training.world import World

PAIRS = 64  # of frames, in a step of the video encoder
LONG_SHARE = 1 / 3  # of the audio encoder's steps


def video_features(model: VideoLlama2Model, shown: Tensor) -> Float[Tensor, "videos tokens width"]:
    """The input of the connector's MLP, from uint8 frames [videos, frames, side, side, 3]."""
    values = pixels(shown.to(model.device))
    return model.mm_projector.merged(model.vision_tower(values.flatten(0, 1)).unflatten(0, values.shape[:2]))


def audio_features(model: VideoLlama2Model, fbanks: Tensor) -> Float[Tensor, "sounds tokens width"]:
    """The input of the audio projector."""
    return model.audio_tower(fbanks.to(model.device).float())


def teach(model: VideoLlama2Model, world: World, banks: Sequence[Labelled], seed: int) -> nn.ModuleDict:
    """Train both encoders on the labels of their tokens. Return the heads, which are not part of the model.

    banks: of each length. BEATs is trained on all, because its features of a sound depend on the length of the input.
    Frames are encoded in pairs, so that pictures of short clips suffice.
    """
    attention_of = model.config.vision_config._attn_implementation
    model.config.vision_config._attn_implementation = attention.NAME
    make = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    bank, width = banks[0], model.config.hidden_size
    frames = bank.frames
    assert frames is not None
    heads = nn.ModuleDict({name: nn.Linear(width, labels) for name, labels in world.heads.items()})
    heads.to(model.device)
    pairs = frames.shape[1] // 2
    tokens = next(iter(bank.seen.values())).shape[1] // pairs

    def watch() -> Tensor:
        """The loss on one pair of frames of each of some videos, which varies more than whole videos."""
        rows = torch.randint(len(frames), (PAIRS,), generator=make)
        pair = int(torch.randint(pairs, (), generator=make))
        hidden = video_features(model, frames[rows, 2 * pair : 2 * pair + 2]).float()
        place = slice(pair * tokens, (pair + 1) * tokens)
        logits = {name: head(hidden) for name, head in heads.items()}
        return world.video_loss(logits, {name: labels[rows, place] for name, labels in bank.seen.items()})

    def listen() -> Tensor:
        length = 0
        if len(banks) > 1 and bool(torch.rand((), generator=make) < LONG_SHARE):
            length = 1 if len(banks) == 2 else int(torch.randint(1, len(banks), (), generator=make))
        heard = banks[length]
        rows = torch.randint(len(heard.fbanks), (world.sounds[length],), generator=make)
        said = model.audio_tower.predictor(audio_features(model, heard.fbanks[rows]))
        return world.audio_loss(said, {name: labels[rows] for name, labels in heard.heard.items()})

    parts = {"audio encoder": (listen, world.audio_steps), "video encoder": (watch, world.video_steps)}
    for name, (loss, steps) in parts.items():
        learning = [model.audio_tower] if loss is listen else [model.vision_tower, model.mm_projector, heads]
        _fit(name, loss, steps, [item for part in learning for item in part.named_parameters()], model.device)
    model.config.vision_config._attn_implementation = attention_of
    return heads


def _fit(
    name: str,
    loss: Callable[[], Tensor],
    steps: int,
    parameters: list[tuple[str, nn.Parameter]],
    device: torch.device,
) -> None:
    found, progress = optimizers(parameters), Progress(name, steps)
    for number in range(steps):
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        step(value, found, rate(number, steps, held=0.3))
        progress.tell(number, f"loss {float(value.detach()):.3f}")


@torch.no_grad()
def features(model: VideoLlama2Model, bank: Labelled) -> tuple[Tensor, Tensor]:
    """Features of a bank's pictures and of its sounds, in bfloat16: each [number, tokens, width]."""
    size = 512 // bank.scheme.num_frames
    seen = []
    for first in range(0, len(bank.bank.pictures), size):
        rows = slice(first, first + size)
        part = render(bank.bank, bank.scheme, rows) if bank.frames is None else bank.frames[rows]
        seen.append(video_features(model, part).bfloat16())
    heard = [audio_features(model, part).bfloat16() for part in bank.fbanks.split(25_600 // bank.fbanks.shape[1])]
    return torch.cat(seen), torch.cat(heard)


def accuracy(
    model: VideoLlama2Model, world: World, bank: Labelled, heads: nn.ModuleDict, seen: Tensor, heard: Tensor
) -> Iterator[tuple[str, float]]:
    """The share of right labels, by what they say.  seen, heard: features of the bank's clips."""
    with torch.no_grad():
        said = model.audio_tower.predictor(heard.float())
        logits = {name: head(seen.float()) for name, head in heads.items()}
        yield from world.readings(logits, bank.seen, said, bank.heard)
