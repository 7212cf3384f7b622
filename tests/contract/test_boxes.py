"""Which part of a frame each token shows: in every family, and against the model's own order of tokens.

The check is independent of the adapters. Encoders are made local: without attention and convolutions between places,
a token depends on the pixels of its own place alone. Then a region of every frame is changed, and the embeddings that
the decoder gets must change where boxes meet the region, and nowhere else.
"""

import importlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastav.adapter import ModelAdapter, Prepared, adapter_for
from fastav.layout import Layout, Modality
from fastav.media import Clip
from fastav.models.tiny import TinyAdapter
from fastav.models.videollama2.connector import SqueezeExcite
from fastav.request import Request
from support.family import NAMES
from support.native import FAMILIES

SIZES = {"wide": (60, 100), "high": (110, 60)}
REGIONS = {"top left": (0.0, 0.0, 0.28, 0.25), "right": (0.2, 0.6, 0.75, 1.0), "bottom": (0.6, 0.1, 1.0, 0.55)}
MARGIN = 0.09  # share of a frame to which resizing carries a change
WHOLE = {"phi4_multimodal": 2}  # how often a frame is covered
NO_IMAGES = {*FAMILIES, "tiny"}
UNCOVERED = {"videollama2", "video_salmonn2", "tiny"}  # pixels at the right and bottom end that fill no patch


class _Enough(Exception):
    """Stops a forward before the decoder."""


@dataclass(frozen=True)
class Shown:
    """A family with a model whose encoders are local."""

    name: str
    adapter: ModelAdapter
    model: Any
    processor: Any

    def prepare(self, frames: np.ndarray, *, is_image: bool = False) -> Prepared:
        clip = Clip.from_arrays(frames=frames[:1] if is_image else frames, fps=5.0)
        content = [{"type": "image", "image": clip}, {"type": "text", "text": "what?"}]
        request = (
            Request(messages=[{"role": "user", "content": content}])
            if is_image
            else Request(clip=clip, question="what?")
        )
        return self.adapter.prepare(self.processor, [request])

    def embeddings(self, prepared: Prepared) -> torch.Tensor:
        """What the first decoder layer gets, [tokens, features]."""
        held: list[torch.Tensor] = []

        def hold(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            held.append(self.adapter.attending_hidden(hidden)[0].detach().clone())
            raise _Enough

        layers: Any = self.adapter.decoder(self.model).layers
        handle = layers[0].register_forward_pre_hook(hold, with_kwargs=True)
        try:
            with torch.no_grad(), suppress(_Enough):
                self.model(**prepared.inputs)
        finally:
            handle.remove()
        return held[0]


def localized(encoders: tuple[nn.Module, ...]) -> None:
    """Make encoders work on each place by itself."""
    for module in (one for encoder in encoders for one in encoder.modules()):
        if "Attention" in type(module).__name__:
            for name in ("o_proj", "out_proj", "proj"):
                for parameter in getattr(module, name, nn.Identity()).parameters():
                    parameter.data.zero_()
        if isinstance(module, nn.Conv2d) and module.groups > 1 and module.stride == (1, 1):
            middle = module.weight.data[..., module.kernel_size[0] // 2, module.kernel_size[1] // 2].clone()
            module.weight.data.zero_()
            module.weight.data[..., module.kernel_size[0] // 2, module.kernel_size[1] // 2] = middle
        if isinstance(module, SqueezeExcite):
            module.forward = lambda pixels: pixels


@cache
def shown(name: str) -> Shown:
    if name == "tiny":
        adapter: ModelAdapter = TinyAdapter()
        model, processor = adapter.load(adapter.checkpoint, dtype=torch.float32)
    elif name in FAMILIES:
        adapter = FAMILIES[name].adapter
        model, processor = FAMILIES[name].load()
    else:
        model, processor = importlib.import_module(f"support.families.{name}").build("sdpa")
        adapter = adapter_for([type(model).__name__])
    localized(adapter.encoders(adapter.language_model(model)))
    return Shown(name, adapter, model, processor)


@pytest.fixture(params=[*NAMES, *FAMILIES, "tiny"], scope="module")
def family(request):
    return shown(request.param)


def noise(size: tuple[int, int], frames: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


@cache
def unchanged(name: str, size: tuple[int, int], is_image: bool) -> tuple[Layout, torch.Tensor]:
    """Layout and embeddings of frames of noise."""
    prepared = shown(name).prepare(noise(size), is_image=is_image)
    return prepared.layouts[0], shown(name).embeddings(prepared)


def areas(box: np.ndarray) -> np.ndarray:
    return (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])


def pictures(layout: Layout) -> list[np.ndarray]:
    """The boxes of each frame."""
    known = ~np.isnan(layout.box[:, 0])
    return [layout.box[known & (layout.frame == frame)] for frame in np.unique(layout.frame[known])]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_boxes_of_a_frame_tile_it(family, size):
    (layout,) = family.prepare(noise(size)).layouts
    seen = np.isin(layout.modality, (Modality.VIDEO, Modality.IMAGE))
    assert np.isnan(layout.box[~seen]).all()
    frames = pictures(layout)
    assert frames
    for box in frames:
        assert (box >= 0).all()
        assert (box <= 1).all()
        assert (areas(box) > 0).all()
        times = WHOLE.get(family.name, 1)
        end = float(box[:, 2].max() * box[:, 3].max())
        assert areas(box).sum() == pytest.approx(times * end, rel=1e-4)
        assert end == pytest.approx(1, rel=1e-4) or (family.name in UNCOVERED and end > 0.5)
        middles = np.random.default_rng(1).uniform(0, 1, (200, 2)) * [box[:, 2].max(), box[:, 3].max()]
        top, left, bottom, right = box.T[:, None]
        y, x = middles.T[..., None]
        inside = (top <= y) & (y < bottom) & (left <= x) & (x < right)
        assert (inside.sum(1) == times).all()  # neither gaps nor overlaps


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_pixels_change_the_tokens_whose_box_they_are_in(family, size, region, kind):
    is_image = kind == "image"
    if is_image and family.name in NO_IMAGES:
        pytest.skip("it takes no images")
    top, left, bottom, right = (round(share * side) for share, side in zip(region, (*size, *size), strict=True))
    changed = noise(size)
    changed[:, top:bottom, left:right] = 255 - changed[:, top:bottom, left:right] // 2
    layout, before = unchanged(family.name, size, is_image)
    after = family.prepare(changed, is_image=is_image)
    box = layout.box
    assert np.array_equal(box, after.layouts[0].box, equal_nan=True)
    difference = (before - family.embeddings(after)).abs().amax(1).numpy()
    meets, apart = _overlaps(box, region, -MARGIN), ~_overlaps(box, region, MARGIN)
    largest = difference.max()
    assert largest > 1e-3
    assert meets.any()
    known = ~np.isnan(box[:, 0])
    assert (apart & known).any() or known.sum() == 1  # a small picture may be one token
    assert difference[meets].min() > 1e-4 * largest
    assert difference[apart].max() <= 1e-6 * largest


def _overlaps(box: np.ndarray, region: tuple[float, ...], grown: float) -> np.ndarray:
    """Which boxes overlap a region that is grown by a share of the frame on all sides; none of those that are NaN."""
    top, left, bottom, right = box.T
    down = np.minimum(bottom, region[2] + grown) - np.maximum(top, region[0] - grown)
    across = np.minimum(right, region[3] + grown) - np.maximum(left, region[1] - grown)
    return (down > 0) & (across > 0)


@pytest.mark.parametrize(("name", "start"), [("videollama2", 0.85), ("video_salmonn2", 0.95)])
@pytest.mark.parametrize("side", ["right", "bottom"])
def test_pixels_that_fill_no_patch_are_in_no_box(name, start, side):
    family, size = shown(name), SIZES["wide"]
    strip = (0.0, start, 1.0, 1.0) if side == "right" else (start, 0.0, 1.0, 1.0)
    top, left, bottom, right = (round(share * side) for share, side in zip(strip, (*size, *size), strict=True))
    changed = noise(size)
    changed[:, top:bottom, left:right] = 0
    layout, before = unchanged(name, size, False)
    assert torch.equal(family.embeddings(family.prepare(changed)), before)
    assert not _overlaps(layout.box, strip, 0.0).any()


def test_boxes_of_an_image_tile_it(family):
    if family.name in NO_IMAGES:
        pytest.skip("it takes no images")
    layout, _ = unchanged(family.name, SIZES["wide"], True)
    box = layout.box[layout.modality == Modality.IMAGE]
    assert areas(box[~np.isnan(box[:, 0])]).sum() == pytest.approx(WHOLE.get(family.name, 1), rel=1e-4)


def test_a_layout_read_off_the_inputs_has_the_same_boxes(family):
    prepared = family.prepare(noise((60, 100)))
    (layout,) = family.adapter.layouts(family.model.config, prepared.inputs)
    if family.name == "phi4_multimodal":  # the size of a picture before it is scaled is no input
        assert np.isnan(layout.box).all()
    else:
        assert np.array_equal(layout.box, prepared.layouts[0].box, equal_nan=True)
