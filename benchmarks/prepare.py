"""The time to prepare a clip, against the least cost of the model's encoders: `make bench-prepare`.

A clip of 30 s, 1280 x 720, H.264 with AAC, in which everything moves, is prepared for every family with the settings of
its release. Seconds are CPU time of the process, all threads together, so that other work on the machine does not
count; torch has one thread, PyAV decodes video on as many as FFmpeg chooses, PIL scales on several. The encoders' least
cost is 2 FLOPs for each weight of the linear layers in their stacks of equal layers and each position that runs through
them (attention, convolutions and projectors are left out; of Gemma 3n's convolutional vision tower, all that torch
counts), at the best rate at which one thread of this machine multiplies float32 matrices.
"""

import json
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import conftest  # noqa: F401  (makes torchvision importable, for transformers' video processors)
from fastav.adapter import ModelAdapter, Prepared
from fastav.bench.report import write
from fastav.bench.table import grid
from fastav.layout import Layout, Modality
from fastav.media import AudioTrack, Clip, VideoTrack
from fastav.provenance import provenance
from fastav.registry import MODELS
from fastav.request import Request, Use
from media_files import tone, write_clip
from support.released import RELEASED

RESULT = Path(__file__).parents[1] / "results" / "prepare-cpu.json"
SECONDS, FPS, WIDTH, HEIGHT = 30, 25, 1280, 720
RATE, BLOCK = 48_000, 1024  # samples a second, and of one packet of AAC, of which none goes past the end
ROUNDS = 3

Inputs = Mapping[str, Any]


def _patches(inputs: Inputs) -> int:
    return len(inputs["pixel_values_videos"])


def _siglip(inputs: Inputs) -> int:
    *frames, _, height, width = inputs["pixel_values_videos"].shape
    return prod(frames) * (height // 14) * (width // 14)


def _whisper(inputs: Inputs) -> int:
    return inputs["input_features"].shape[0] * inputs["input_features"].shape[2] // 2


def _columns(name: str, each: int) -> Callable[[Inputs], int]:
    """A position for every `each` columns of the spectrogram."""
    return lambda inputs: inputs[name].shape[1] // each


def _audio_columns(each: int) -> Callable[[Inputs], int]:
    """A position for every `each` columns of the spectrogram that hold sound."""
    return lambda inputs: int(inputs["feature_attention_mask"].sum()) // each


SIGLIP = "model.vision_tower.vision_tower.vision_model.encoder.layers"
PHI4 = "model.embed_tokens_extend"
STACKS: dict[str, dict[str, Callable[[Inputs], int]]] = {  # of layers, and the positions that run through them
    "gemma3n": {"model.audio_tower.conformer": _columns("input_features", 4)},
    "gemma4": {
        "model.vision_tower.encoder.layers": lambda inputs: int((inputs["video_position_ids"] >= 0).all(-1).sum()),
        "model.audio_tower.layers": _columns("input_features", 4),
    },
    "phi4-multimodal": {
        f"{PHI4}.image_embed.img_processor.encoder.layers": lambda inputs: inputs["image_attention_mask"].numel(),
        f"{PHI4}.audio_embed.encoder.encoders": _columns("audio_input_features", 8),
    },
    "qwen2-5-omni": {"visual.blocks": _patches, "audio_tower.layers": _audio_columns(2)},
    "qwen2-5-vl": {"model.visual.blocks": _patches},
    "qwen3-omni": {"visual.blocks": _patches, "audio_tower.layers": _audio_columns(8)},
    "qwen3-vl": {"model.visual.blocks": _patches},
    "video-llama3": {"model.vision_model.encoder.layers": _patches},
    "video-salmonn2": {SIGLIP: _siglip, "speech_encoder.layers": _whisper},
    "video-salmonn2-plus": {"visual.blocks": _patches, "audio.layers": _whisper},
    "videollama2": {
        SIGLIP: _siglip,
        "model.audio_tower.encoder.layers": lambda inputs: prod(n // 16 for n in inputs["input_features"].shape[1:]),
    },
}


class DecodeTimer:
    """CPU seconds of decoding video and of reading sound."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the time inside the block to a part."""
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[part] += time.process_time() - start

    def install(self) -> None:
        """Time the tracks of all clips from here on."""
        for kind, name, part in (
            (VideoTrack, "read", "video"),
            (AudioTrack, "read", "sound"),
            (AudioTrack, "native", "sound"),
        ):
            setattr(kind, name, self._timed(getattr(kind, name), part))
        VideoTrack.each = self._timed_one_by_one(VideoTrack.each)

    def _timed(self, read: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(read)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(part):
                return read(*args, **kwargs)

        return timed

    def _timed_one_by_one(self, each: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
        @wraps(each)
        def timed(*args: Any) -> Iterator[Any]:
            pictures = each(*args)
            while True:
                with self.timing("video"):
                    picture = next(pictures, None)
                if picture is None:
                    return
                yield picture

        return timed


@cache
def landscape() -> np.ndarray:
    """A picture larger than a frame, with coarse and fine structure."""
    random, scene = np.random.default_rng(0), 0.0
    for cells, weight in ((24, 128), (240, 77), (960, 50)):
        noise = torch.from_numpy(random.random((1, 3, cells * 9 // 16, cells), np.float32))
        scene = scene + weight * torch.nn.functional.interpolate(noise, size=(1080, 1920), mode="bicubic")[0]
    return scene.clamp(0, 255).byte().permute(1, 2, 0).numpy()


def moving(number: int, width: int, height: int) -> np.ndarray:
    """A frame: the part of the landscape that the moving camera shows."""
    x, y = int(320 + 310 * np.sin(number / 40)), int(180 + 170 * np.cos(number / 55))
    return np.ascontiguousarray(landscape()[y : y + height, x : x + width])


def write_example(folder: Path) -> Path:
    """Write the clip."""
    sound = tone(SECONDS * RATE // BLOCK * BLOCK / RATE, RATE, channels=2)
    video = {"frames": SECONDS * FPS, "fps": FPS, "size": (WIDTH, HEIGHT), "picture": moving}
    return write_clip(folder / "clip.mp4", **video, audio="aac", sound=sound, rate=RATE, layout="stereo")


def matmul_rate(rounds: int = 5) -> float:
    """The best rate of one thread for float32 matrices of an encoder's shape, in FLOPs a second."""
    left, right = torch.randn(2048, 1280), torch.randn(1280, 5120)
    best = 0.0
    for _ in range(rounds):
        start = time.process_time()
        torch.matmul(left, right)
        best = max(best, 2 * 2048 * 1280 * 5120 / (time.process_time() - start))
    return best


def encoder_flops(adapter: ModelAdapter, inputs: Inputs) -> dict[str, float]:
    """The least FLOPs of each encoder of the release for these inputs."""
    with torch.device("meta"):
        model = adapter.language_model(adapter.build(adapter.config()))
    flops = {}
    for name, positions in STACKS[adapter.name].items():
        linear = (layer for layer in model.get_submodule(name).modules() if isinstance(layer, nn.Linear))
        flops[name] = 2.0 * sum(layer.weight.numel() for layer in linear) * positions(inputs)
    if adapter.name == "gemma3n":
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.get_submodule("model.vision_tower").eval()(inputs["pixel_values"].to("meta"))
        flops["model.vision_tower"] = float(counter.get_total_flops())
    return flops


def prepare(name: str, clip: Clip, timer: DecodeTimer) -> tuple[Prepared, dict[str, float]]:
    """One family's inputs, and the median seconds of each part of preparing them."""
    adapter, processor = MODELS[name](), RELEASED[name]()
    request = Request(clip=clip, question="What is happening?", use=Use.AUTO if adapter.supports_audio else Use.VIDEO)
    result, rounds = adapter.prepare(processor, [request]), []  # a warm-up, which imports modules
    for _ in range(ROUNDS):
        timer.seconds.clear()
        wall, start = time.perf_counter(), time.process_time()
        result = adapter.prepare(processor, [request])
        whole = time.process_time() - start
        parts = {part: timer.seconds[part] for part in ("video", "sound")}
        rounds.append({**parts, "rest": whole - sum(parts.values()), "all": whole, "wall": time.perf_counter() - wall})
    return result, {part: median(one[part] for one in rounds) for part in rounds[0]}


def clip_tokens(layout: Layout) -> tuple[int, int]:
    """Tokens of pictures, and of sound."""
    return layout.count(Modality.VIDEO, Modality.IMAGE), layout.count(Modality.AUDIO)


def row(name: str, clip: Clip, timer: DecodeTimer, rate: float) -> dict[str, Any]:
    """One family's row.  rate: FLOPs a second of the encoders."""
    adapter = MODELS[name]()
    result, seconds = prepare(name, clip, timer)
    tokens = clip_tokens(result.layouts[0])
    assert tokens == clip_tokens(adapter.example(adapter.config(), seconds=SECONDS, text=44)), f"{name}: {tokens}"
    flops = encoder_flops(adapter, result.inputs)
    least = sum(flops.values()) / rate
    seconds |= {"encoders": least, "ratio": seconds["all"] / least}
    return {"family": name, "tokens": tokens, "seconds": seconds, "encoder_flops": flops}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, as Markdown."""
    head = ("family", "video", "sound", "rest", "**all**", "encoders, at least", "all / encoders")
    cells = []
    for one in rows:
        s = one["seconds"]
        parts = [f"{s[part]:.2f}" for part in ("video", "sound", "rest")]
        ratio = f"{100 * s['ratio']:.1f} %"
        cells.append([f"`{one['family']}`", *parts, f"**{s['all']:.2f}**", f"{s['encoders']:,.0f}", ratio])
    return "\n".join(grid(head, cells))


def main() -> None:
    """Measure every family, print the table, write the JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    timer = DecodeTimer()
    timer.install()
    with tempfile.TemporaryDirectory() as folder:
        path = write_example(Path(folder))
        megabits = path.stat().st_size * 8e-6 / SECONDS
        start = time.process_time()
        clip = Clip.open(path)
        opening, rate = time.process_time() - start, matmul_rate()
        rows = [row(name, clip, timer, rate) for name in MODELS if name != "tiny"]  # which is no release
    facts = provenance(torch.device("cpu"))
    result = {"command": "make bench-prepare", **facts, "how": __doc__, "rounds": ROUNDS}
    video = {"seconds": SECONDS, "fps": FPS, "size": [WIDTH, HEIGHT], "megabits_a_second": megabits}
    result |= {"clip": video, "open_seconds": opening, "matmul_gflops": rate / 1e9, "rows": rows}
    write(json.loads(json.dumps(result)), RESULT)
    print(f"{table(rows)}\n\n{rate / 1e9:.0f} GFLOP/s a thread; opening the clip took {opening:.2f} s; {RESULT}")


if __name__ == "__main__":
    main()
