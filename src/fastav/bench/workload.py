"""What is run: a model of random weights, and a batch of prompts of random content."""

import gc
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from fastav.adapter import ModelAdapter
from fastav.bench.contenders import Contender
from fastav.bench.subjects import Prompt, Subject
from fastav.engines.transformers import Decoding, prune
from fastav.engines.transformers.compiled_layers import compiled
from fastav.engines.transformers.generation import loop
from fastav.errors import FastAVError, UnsupportedModel, reason_of
from fastav.layout import Layout, Modality
from fastav.models.videollama2 import VideoLlama2Config

ORDINARY = range(8, 200)  # ids that stand for words in every vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model, and a batch of alike prompts.

    inputs: what `forward` is given: embeddings, or ids where the family takes no embeddings. raw: ids with media to
    encode; None where the family's are not known, or the prompt is not what its encoders give.
    """

    model: PreTrainedModel
    adapter: ModelAdapter
    layout: Layout
    batch: int
    inputs: Mapping[str, Tensor]
    raw: Mapping[str, Tensor] | None
    decoding: Decoding

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.device

    @property
    def last_logits(self) -> dict[str, int]:
        """What has `forward` make the last token's logits only; nothing, where a family makes all."""
        return {"logits_to_keep": 1} if "logits_to_keep" in signature(self.model.forward).parameters else {}

    @contextmanager
    def running(self, contender: Contender) -> Iterator[None]:
        """While active, the model attends and is pruned as this contender asks."""
        _attend_by(self.model, contender.attention)
        with ExitStack() as stack:
            if contender.compiled:
                stack.enter_context(compiled(self.adapter.decoder(self.model)))
            if contender.plan.steps:
                layouts = [self.layout] * self.batch
                stack.enter_context(prune(self.model, contender.plan, layouts=layouts, adapter=self.adapter))
            yield


def build_model(of: Subject, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights of the real shape, made on the device; nothing ends an answer early.

    Raises: FastAVError if there is no room for them.
    """
    _require_room(of, device, weight_bytes(of, dtype))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), warnings.catch_warnings(action="ignore"):  # of configurations without checkpoints
            model = of.adapter.build(of.config)
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise FastAVError(f"out of memory for the weights of {of.name}", "try --dtype bfloat16") from None
    finally:
        torch.set_default_dtype(before)
    _attend_by(model, "sdpa")
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.eval()
    return model


def weight_bytes(of: Subject, dtype: torch.dtype) -> int:
    """Bytes of all weights, from the configuration alone."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        return dtype.itemsize * sum(weight.numel() for weight in of.adapter.build(of.config).parameters())


def build(model: PreTrainedModel, adapter: ModelAdapter, prompt: Prompt, batch: int) -> Workload:
    """A batch of prompts of random content."""
    layout, device = prompt.layout, model.device
    prepare: Any = model.prepare_inputs_for_generation
    if "inputs_embeds" in signature(prepare).parameters:
        hidden = adapter.shape(model.config).hidden
        inputs = {"inputs_embeds": torch.randn(batch, len(layout), hidden, device=device, dtype=model.dtype)}
    else:
        low, high = ORDINARY.start, ORDINARY.stop
        inputs = {"input_ids": torch.randint(low, high, (batch, len(layout)), device=device)}
    return Workload(
        model=model,
        adapter=adapter,
        layout=layout,
        batch=batch,
        inputs=inputs,
        raw=_raw(model, layout, batch),
        decoding=Decoding(adapter),
    )


def _raw(model: PreTrainedModel, layout: Layout, batch: int) -> dict[str, Tensor] | None:
    """Ids and random media of VideoLLaMA2, whose number of tokens is what its encoders give; else None."""
    config = model.config
    if not isinstance(config, VideoLlama2Config):
        return None
    scheme, device, dtype = config.scheme, model.device, model.dtype
    frames, side = min(scheme.num_frames, scheme.most_frames), scheme.image_size
    if layout.count(Modality.VIDEO) != scheme.video_tokens(frames):
        return None
    if layout.count(Modality.AUDIO) != scheme.audio_tokens:
        return None
    placeholder = {Modality.VIDEO: scheme.video_token_id, Modality.AUDIO: scheme.audio_token_id, Modality.TEXT: 1}
    row = torch.tensor([placeholder[Modality(m)] for m in layout.modality], device=device)
    return {
        "input_ids": row.expand(batch, -1).contiguous(),
        "pixel_values_videos": torch.randn(batch, frames, 3, side, side, device=device, dtype=dtype),
        "input_features": torch.randn(batch, scheme.fbank_rows, scheme.mel_bins, device=device, dtype=dtype),
    }


def _attend_by(model: PreTrainedModel, attention: str) -> None:
    """Have the decoder attend so.  Raises: UnsupportedModel for attention that the model has no use for."""
    if model.config.get_text_config(decoder=True)._attn_implementation == attention:
        return  # which may be set though an encoder knows no such attention
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise UnsupportedModel(f"{type(model).__name__} cannot run with {attention}: {reason_of(error)}") from None


@contextmanager
def captures(number: int) -> Iterator[None]:
    """While active, as many captured steps are held, so that none is captured twice; afterwards none is."""
    with swapped(loop, "MAX_STEPS", number):
        try:
            yield
        finally:
            loop._steps.clear()


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While active, an attribute of a class or module is another."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def lacks_memory(error: BaseException) -> bool:
    """Whether this is torch's way, or Python's, to say that memory is out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def release() -> None:
    """Give back memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _require_room(of: Subject, device: torch.device, weights: int) -> None:
    left = _room(device)
    if left is not None and weights > left:
        raise FastAVError(
            f"the weights of {of.name} take {weights / 1e9:.1f} GB, and {device} has {left / 1e9:.1f} GB left",
            "try --dtype bfloat16, or another machine",
        )


def _room(device: torch.device) -> int | None:
    """Bytes of memory that are free; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((1024 * int(kilobytes) for kilobytes in found), None)
