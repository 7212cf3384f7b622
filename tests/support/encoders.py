"""Models with the attention of their encoders' last layers as whole maps, pooled token by token."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, linear
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.video_llama_3 import modeling_video_llama_3
from transformers.vision_utils import get_vision_window_index

from fastav.adapter import ModelAdapter, Prepared, adapter_for
from fastav.layout import Modality
from fastav.media import Clip
from fastav.method import Signal
from fastav.models.tiny import TinyAdapter
from fastav.models.videollama2.beats import relative_buckets
from fastav.request import Request, Use
from support.families import qwen2_5_omni, qwen2_5_vl, qwen3_omni, qwen3_vl, video_llama3
from support.families._tiny import randomized
from support.native import FAMILIES, REFERENCE

MODALITIES = {
    Signal.AUDIO_ENCODER: (Modality.AUDIO,),
    Signal.VISION_ENCODER: (Modality.IMAGE, Modality.VIDEO),
}
Received = dict[Modality, Tensor]  # what each token of a modality receives, in the order of a batch's prompts


@dataclass
class Case:
    """A model and one of its encoders.  dense: what its whole maps say of the inputs of a batch."""

    signal: Signal
    adapter: ModelAdapter
    model: Any
    processor: Any
    requests: list[Request]
    dense: Callable[[Any, dict[str, Any]], Received]

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return MODALITIES[self.signal]

    def prepare(self, *rows: int) -> Prepared:
        return self.adapter.prepare(self.processor, [self.requests[row] for row in rows])


# --- whole maps


@contextmanager
def eager(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def maps_of(last: Any, module: ModuleType) -> Iterator[list[Tensor]]:
    """The maps [heads, queries, keys] that a module's eager attention makes in one layer, sequence by sequence."""
    plain, maps = module.eager_attention_forward, []

    def recording(attention: Any, *args: Any, **kwargs: Any) -> Any:
        said, weights = plain(attention, *args, **kwargs)
        if attention is last:
            maps.append(weights[0])
        return said, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", recording)
        yield maps


def received(maps: list[Tensor]) -> Tensor:
    """What each position receives in its own sequence, one sequence behind another."""
    return torch.cat([weights.mean((0, 1)) for weights in maps])


# --- audio


def beats(model: Any, inputs: dict[str, Any]) -> Received:
    """From whole maps, with biases pair by pair; they are the model's own, as they give what its attention says."""
    attention, seen = model.model.audio_tower.encoder.layers[-1].self_attn, {}

    def after(module, args, output):
        seen.update(hidden=args[0], output=output[0])

    handle = attention.register_forward_hook(after)
    model.model.get_audio_features(inputs["input_features"])
    handle.remove()
    table = model.model.audio_tower.encoder.layers[0].self_attn.relative_attention_bias.weight
    found = []
    for hidden, output in zip(seen["hidden"], seen["output"], strict=True):
        n, heads = len(hidden), attention.heads
        query, key, value = (
            linear(hidden, p.weight, p.bias).view(n, heads, -1).transpose(0, 1)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        buckets = relative_buckets(n, len(table), attention.farthest, hidden.device)
        place = torch.arange(n)
        bias = table[buckets[place[None] - place[:, None] + n - 1]].permute(2, 0, 1)
        grep = linear(query, attention.grep_linear.weight, attention.grep_linear.bias).view(heads, n, 2, 4).sum(-1)
        near, far = grep.sigmoid()[..., 0], grep.sigmoid()[..., 1]
        gate = near * (far * attention.grep_a.view(heads, 1) - 1) + 2
        logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5 + gate[..., None] * bias
        weights = logits.softmax(-1)
        said = linear(
            (weights @ value).transpose(0, 1).reshape(n, -1), attention.out_proj.weight, attention.out_proj.bias
        )
        assert (said - output).abs().max() < 1e-4 * output.abs().max()
        found.append(weights.mean((0, 1)))
    return {Modality.AUDIO: torch.cat(found)}


def windowed(module: ModuleType, pooled: bool) -> Callable[[Any, dict[str, Any]], Received]:
    """From the weights that the model's own eager attention returns, window by window."""

    def dense(model: Any, inputs: dict[str, Any]) -> Received:
        last, found = adapter_of(model).encoders(model)[1].layers[-1].self_attn, []
        with maps_of(last, module) as maps, eager(model):
            for features, mask in zip(inputs["input_features"], inputs["feature_attention_mask"], strict=True):
                maps.clear()
                model.get_audio_features(features[None], mask[None])
                found.append(avg_pool1d(received(maps)[None], 2, 2)[0] if pooled else received(maps))
            assert len(maps) > 1, "the last sound is longer than a window"
        return {Modality.AUDIO: torch.cat(found)}

    return dense


# --- vision


def patched(module: ModuleType) -> Callable[[Any, dict[str, Any]], Received]:
    """From the weights that a Qwen tower's eager attention returns, images and videos by themselves."""

    def dense(model: Any, inputs: dict[str, Any]) -> Received:
        tower: Any = adapter_of(model).encoders(model)[0]
        found = {}
        with maps_of(tower.blocks[-1].attn, module) as maps, eager(model):
            for modality, pixels, grid, encode in (
                (Modality.IMAGE, "pixel_values", "image_grid_thw", "get_image_features"),
                (Modality.VIDEO, "pixel_values_videos", "video_grid_thw", "get_video_features"),
            ):
                if inputs.get(pixels) is None:
                    continue
                maps.clear()
                getattr(model, encode)(inputs[pixels], inputs[grid])
                tokens = received(maps).view(-1, tower.spatial_merge_size**2).mean(1)
                found[modality] = tokens[as_prompted(tower, inputs[grid])]
        return found

    return dense


def as_prompted(tower: Any, grids: Tensor) -> Tensor:
    """The place in the tower of each token of the prompts."""
    merge = tower.spatial_merge_size
    if not hasattr(tower, "window_size"):
        return torch.arange(int(grids.prod(1).sum()) // merge**2)
    index, _ = get_vision_window_index(grids, merge, tower.window_size, tower.patch_size)
    places = torch.zeros(len(index), dtype=torch.long)
    for place, token in enumerate(index.tolist()):
        places[token] = place
    return places


def framed(model: Any, inputs: dict[str, Any]) -> Received:
    """VideoLLaMA3: from its eager attention, frame by frame and token by token; compressed tokens are left out."""
    tower, found = model.model.vision_model, {}
    with maps_of(tower.encoder.layers[-1].self_attn, modeling_video_llama_3) as maps, eager(model):
        for modality, pixels, kind in (
            (Modality.IMAGE, "pixel_values", "image"),
            (Modality.VIDEO, "pixel_values_videos", "video"),
        ):
            if inputs.get(pixels) is None:
                continue
            maps.clear()
            merges = inputs[f"{kind}_merge_sizes"]
            encode = getattr(model.model, f"get_{kind}_features")
            encode(inputs[pixels], inputs[f"{kind}_grid_thw"], merges)
            assert set(merges.tolist()) == {2}
            found[modality] = torch.stack([four.mean() for four in received(maps).split(4)])
    if (mask := inputs.get("video_compression_mask")) is not None:
        assert not mask.all(), "some tokens are compressed"
        found[Modality.VIDEO] = torch.stack(
            [one for one, there in zip(found[Modality.VIDEO], mask, strict=True) if there]
        )
    return found


def siglip(pool: Callable[[Tensor], list[Tensor]]) -> Callable[[Any, dict[str, Any]], Received]:
    """From the maps that the model returns of SigLIP.  pool: of the patches [frames, rows, columns], its tokens."""

    def dense(model: Any, inputs: dict[str, Any]) -> Received:
        pixels = inputs["pixel_values_videos"]
        with eager(model):
            maps = model.get_video_features(pixels, output_attentions=True, return_dict=True).attentions[-1]
        frames = torch.stack([weights.mean((0, 1)) for weights in maps])
        side = round(frames.shape[1] ** 0.5)
        frames = frames.view(*pixels.shape[:-3], side, side)
        videos = frames if frames.ndim == 4 else frames[None]
        return {Modality.VIDEO: torch.stack([token for video in videos for token in pool(video)])}

    return dense


def of_pairs(frames: Tensor) -> list[Tensor]:
    """VideoLLaMA2: the mean of two rows and columns of two frames."""
    times, rows, columns = (size // 2 for size in frames.shape)
    return [
        torch.stack([frames[2 * t + i, 2 * r + j, 2 * c + k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]).mean()
        for t in range(times)
        for r in range(rows)
        for c in range(columns)
    ]


def of_squares(frames: Tensor) -> list[Tensor]:
    """video-SALMONN 2: the maximum of two rows and columns, and 0 for the newline behind a row."""
    tokens = []
    for frame in frames:
        for row in range(frame.shape[0] // 2):
            for column in range(frame.shape[1] // 2):
                tokens.append(max(frame[2 * row + i, 2 * column + j] for i in (0, 1) for j in (0, 1)))
            tokens.append(torch.zeros(()))
    return tokens


# --- models


def adapter_of(model: Any) -> Any:
    return adapter_for([type(model).__name__])


def video(seconds: float, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    """Ten frames a second, in whose left half nothing moves."""
    make = np.random.default_rng(0)
    frames = make.integers(0, 256, (int(seconds * 10), *size, 3), dtype=np.uint8)
    frames[:, :, : size[1] // 2] = frames[:1, :, : size[1] // 2]
    return frames


def clips(*seconds: float) -> list[Request]:
    make = np.random.default_rng(0)
    requests = []
    for length in seconds:
        clip = Clip.from_arrays(
            frames=video(length),
            fps=10,
            waveform=make.uniform(-0.5, 0.5, int(length * 16_000)).astype(np.float32),
            sample_rate=16_000,
        )
        requests.append(Request(clip=clip, question=f"What is heard in {length} s?"))
    return requests


def views() -> list[Request]:
    """Prompts of images beside clips, in turns; of a clip; of an image; and of text."""

    def of(*parts: Any) -> Request:
        content = [{"type": kind, kind: value} | options for kind, value, options in parts]
        return Request(messages=[{"role": "user", "content": content}])

    def clip(seconds: float, size: tuple[int, int] = (24, 32)) -> Any:
        return "video", video(seconds, size), {"fps": 10}

    def image(*size: int) -> Any:
        return "image", video(0.1, size)[0], {}

    text = ("text", "What is seen?", {})
    return [
        of(image(240, 320), clip(2.0), image(320, 240), clip(1.1, (32, 24)), text),
        of(clip(3.3), text),
        of(text, image(200, 400)),
        of(text),
    ]


def native(name: str, signal: Signal, dense: Any, clip: str = "clip.mp4", uses: tuple[Use, ...] = tuple(Use)) -> Case:
    model, processor = FAMILIES[name].load()
    requests = [
        Request(clip=Clip.open(REFERENCE / name / clip), question=f"What {use} is it?", use=use)
        for use in uses
        if use is not Use.AUTO
    ]
    return Case(signal, FAMILIES[name].adapter, model, processor, requests, dense)


def embedded(signal: Signal, dense: Any, frames: int = 8) -> Case:
    """The embedded model, with so many frames of each clip."""
    adapter = TinyAdapter()
    model, processor = adapter.load(adapter.checkpoint, dtype=torch.float32)
    known: Any = processor
    known.scheme = {**known.scheme, "num_frames": frames}
    return Case(signal, adapter, model, processor, clips(3.0, 4.0), dense)


def deeper(family: Any, signal: Signal, dense: Any, requests: list[Request], **changes: dict[str, Any]) -> Case:
    """A family's tiny model with other dimensions of its encoders, so that their last layer is not the first."""
    first, processor = family.build()
    config = copy.deepcopy(first.config)
    for part, values in changes.items():
        for name, value in values.items():
            setattr(getattr(config, part), name, value)
    model = randomized(type(first)(config), "sdpa")
    return Case(signal, adapter_of(model), model, processor, requests, dense)


AUDIO, VISION = Signal.AUDIO_ENCODER, Signal.VISION_ENCODER
WINDOWS_LAST = {"depth": 2, "fullatt_block_indexes": [0]}
FULL_LAST = {"depth": 2, "fullatt_block_indexes": [1]}
SOUNDS = (4.0, 2.15, 3.3)
CASES: dict[str, Callable[[], Case]] = {
    "audio of videollama2": lambda: native("videollama2", AUDIO, beats),
    "audio of tiny": lambda: embedded(AUDIO, beats),
    "audio of qwen2-5-omni": lambda: deeper(
        qwen2_5_omni,
        AUDIO,
        windowed(modeling_qwen2_5_omni, pooled=True),
        clips(*SOUNDS),
        audio_config={"encoder_layers": 2, "num_hidden_layers": 2},
    ),
    "audio of qwen3-omni": lambda: deeper(
        qwen3_omni,
        AUDIO,
        windowed(modeling_qwen3_omni_moe, pooled=False),
        clips(*SOUNDS),
        audio_config={
            "encoder_layers": 2,
            "num_hidden_layers": 2,
            "n_window_infer": 200,  # two seconds: clips of more than one window
        },
    ),
    "vision of videollama2": lambda: native("videollama2", VISION, siglip(of_pairs)),
    "vision of tiny": lambda: embedded(VISION, siglip(of_pairs)),
    "vision of tiny, a frame without a partner": lambda: embedded(VISION, siglip(of_pairs), frames=5),
    "vision of video-salmonn2": lambda: native("video_salmonn2", VISION, siglip(of_squares), "clip_short.mp4"),
    "vision of video-salmonn2-plus": lambda: native(
        "video_salmonn2_plus", VISION, patched(modeling_qwen2_5_vl), uses=(Use.BOTH, Use.VIDEO)
    ),
    "vision of qwen2-5-omni": lambda: deeper(
        qwen2_5_omni, VISION, patched(modeling_qwen2_5_omni), views(), vision_config=FULL_LAST
    ),
    "vision of qwen3-omni": lambda: deeper(qwen3_omni, VISION, patched(modeling_qwen3_omni_moe), views()),
    "vision of qwen2-5-vl": lambda: deeper(
        qwen2_5_vl, VISION, patched(modeling_qwen2_5_vl), views(), vision_config=FULL_LAST
    ),
    "vision of qwen2-5-vl, windows last": lambda: deeper(
        qwen2_5_vl, VISION, patched(modeling_qwen2_5_vl), views(), vision_config=WINDOWS_LAST
    ),
    "vision of qwen3-vl": lambda: deeper(qwen3_vl, VISION, patched(modeling_qwen3_vl), views()),
    "vision of video-llama3": lambda: deeper(
        video_llama3, VISION, framed, views(), vision_config={"num_hidden_layers": 2}
    ),
}
