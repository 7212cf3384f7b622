"""Training of the encoders on the labels of their tokens, before they are frozen and their features stored."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fastav.models.videollama2 import VideoLlama2Model
from training import attention
from training.data import Labelled, pixels
from training.labels import IGNORED, MOTIONS, OBJECTS, SOUNDS
from training.optimizers import optimizers, rate, step
from training.progress import Progress

VIDEO_STEPS, AUDIO_STEPS = 800, 320
PAIRS, SOUNDS_AT_ONCE, LONG_SOUNDS_AT_ONCE = 64, 64, 8
LONG_SHARE = 1 / 3  # of the audio encoder's steps
NOTHING_WEIGHT = 0.15  # of tokens without the centre of an object


def video_features(model: VideoLlama2Model, shown: Tensor) -> Float[Tensor, "videos tokens width"]:
    """The input of the connector's MLP, from uint8 frames [videos, frames, side, side, 3]."""
    values = pixels(shown.to(model.device))
    return model.mm_projector.merged(model.vision_tower(values.flatten(0, 1)).unflatten(0, values.shape[:2]))


def audio_features(model: VideoLlama2Model, fbanks: Tensor) -> Float[Tensor, "sounds tokens width"]:
    """The input of the audio projector."""
    return model.audio_tower(fbanks.to(model.device).float())


def teach(model: VideoLlama2Model, bank: Labelled, long: Labelled, seed: int) -> dict[str, nn.Module]:
    """Train both encoders on the labels of their tokens. Return the heads, which are not part of the model.

    long: a bank of long clips. BEATs is trained on some, because its features of a sound depend on the length of the
    input. Frames are encoded in pairs, so that pictures of short clips suffice.
    """
    attention_of = model.config.vision_config._attn_implementation
    model.config.vision_config._attn_implementation = attention.NAME
    make = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    width = model.config.hidden_size
    heads = nn.ModuleDict({"objects": nn.Linear(width, OBJECTS), "motions": nn.Linear(width, MOTIONS)})
    heads.to(model.device)
    tokens = bank.objects.shape[1] // (bank.frames.shape[1] // 2)

    def watch() -> Tensor:
        """The loss on one pair of frames of each of some videos, which varies more than whole videos."""
        rows = torch.randint(len(bank.frames), (PAIRS,), generator=make)
        pair = int(torch.randint(bank.frames.shape[1] // 2, (), generator=make))
        hidden = video_features(model, bank.frames[rows, 2 * pair : 2 * pair + 2]).float()
        place = slice(pair * tokens, (pair + 1) * tokens)
        weights = torch.ones(OBJECTS, device=hidden.device)
        weights[0] = NOTHING_WEIGHT
        what = heads["objects"](hidden).float().flatten(0, 1)
        moves = heads["motions"](hidden).float().flatten(0, 1)
        objects, motions = (labels[rows, place].flatten().to(what.device) for labels in (bank.objects, bank.motions))
        return cross_entropy(what, objects, weights) + 0.5 * cross_entropy(moves, motions, ignore_index=IGNORED)

    def listen() -> Tensor:
        lasts = bool(torch.rand((), generator=make) < LONG_SHARE)
        heard, count = (long, LONG_SOUNDS_AT_ONCE) if lasts else (bank, SOUNDS_AT_ONCE)
        rows = torch.randint(len(heard.fbanks), (count,), generator=make)
        said = model.audio_tower.predictor(audio_features(model, heard.fbanks[rows])).float()
        noises, starts = heard.noises[rows].to(said.device), heard.starts[rows].to(said.device)
        what = cross_entropy(said[..., :SOUNDS].flatten(0, 1), noises.flatten(), ignore_index=IGNORED)
        return what + binary_cross_entropy_with_logits(said[..., SOUNDS], starts, pos_weight=torch.tensor(3.0))

    parts = {"audio encoder": (listen, AUDIO_STEPS), "video encoder": (watch, VIDEO_STEPS)}
    for name, (loss, steps) in parts.items():
        learning = [model.audio_tower] if loss is listen else [model.vision_tower, model.mm_projector, heads]
        _fit(name, loss, steps, [item for part in learning for item in part.named_parameters()], model.device)
    model.config.vision_config._attn_implementation = attention_of
    return dict(heads.items())


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
    seen = [video_features(model, part).bfloat16() for part in bank.frames.split(512 // bank.frames.shape[1])]
    heard = [audio_features(model, part).bfloat16() for part in bank.fbanks.split(25_600 // bank.fbanks.shape[1])]
    return torch.cat(seen), torch.cat(heard)


def accuracy(
    model: VideoLlama2Model, bank: Labelled, heads: dict[str, nn.Module], seen: Tensor, heard: Tensor
) -> Iterator[tuple[str, float]]:
    """The share of right labels among tokens that show or contain something, by kind of label."""
    with torch.no_grad():
        said = model.audio_tower.predictor(heard.float())
        readings = {
            "objects": (heads["objects"](seen.float()), bank.objects, bank.objects > 0),
            "motions": (heads["motions"](seen.float()), bank.motions, bank.motions >= 0),
            "sounds": (said[..., :SOUNDS], bank.noises, bank.noises > 0),
        }
        for name, (logits, labels, counted) in readings.items():
            yield name, float((logits.argmax(-1).cpu() == labels)[counted].float().mean())
        starts = said[..., SOUNDS].cpu() > 0
        yield "starts of beeps", float((starts == bank.starts.bool())[bank.starts.bool()].float().mean())
