"""What runs: a model with random weights, and a batch of prompts with random content."""

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
from fastav.bench.specs import ModelSpec, PromptSpec
from fastav.engines.transformers import Decoding, prune
from fastav.engines.transformers.compiled_layers import compiled
from fastav.engines.transformers.generation.loop import MAX_STEPS
from fastav.errors import FastAVError, UnsupportedModel, reason_of
from fastav.layout import Layout, Modality
from fastav.models.videollama2 import VideoLlama2Config

ORDINARY_IDS = range(8, 200)  # ids of ordinary tokens in every vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model, and a batch of equal prompts.

    inputs: arguments of `forward`: embeddings, or ids where the family takes no embeddings. raw: ids with media to
    encode; None for families whose media are not known here, and for prompts that their encoders do not produce.
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
        """The model's device."""
        return self.model.device

    @property
    def last_logits(self) -> dict[str, int]:
        """The argument that limits `forward` to the last token's logits; empty for families that have none."""
        return {"logits_to_keep": 1} if "logits_to_keep" in signature(self.model.forward).parameters else {}

    @contextmanager
    def running(self, contender: Contender) -> Iterator[None]:
        """While active, the model has this contender's attention, compilation and pruning."""
        _set_attention(self.model, contender.attention)
        with ExitStack() as stack:
            if contender.compiled:
                stack.enter_context(compiled(self.adapter.decoder(self.model)))
            if contender.plan.steps:
                layouts = [self.layout] * self.batch
                stack.enter_context(prune(self.model, contender.plan, layouts=layouts, adapter=self.adapter))
            yield


def build_model(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model with random weights of the real shape, made on the device, and no token that ends an answer.

    Raises: FastAVError if the weights do not fit into memory.
    """
    _require_memory(spec, device, weight_bytes(spec, dtype))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), warnings.catch_warnings(action="ignore"):  # of configurations without checkpoints
            model = spec.adapter.build(spec.config)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise FastAVError(f"out of memory for the weights of {spec.name}", "try --dtype bfloat16") from None
    finally:
        torch.set_default_dtype(before)
    _set_attention(model, "sdpa")
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.eval()
    return model


def weight_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of all weights, from the configuration alone."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        return dtype.itemsize * sum(weight.numel() for weight in spec.adapter.build(spec.config).parameters())


def build(
    model: PreTrainedModel, adapter: ModelAdapter, prompt: PromptSpec, batch: int, *, max_captures: int = MAX_STEPS
) -> Workload:
    """A batch of prompts with random content.  max_captures: captured steps that decoding holds."""
    layout, device = prompt.layout, model.device
    prepare: Any = model.prepare_inputs_for_generation
    if "inputs_embeds" in signature(prepare).parameters:
        hidden = adapter.shape(model.config).hidden
        inputs = {"inputs_embeds": torch.randn(batch, len(layout), hidden, device=device, dtype=model.dtype)}
    else:
        ids = ORDINARY_IDS
        inputs = {"input_ids": torch.randint(ids.start, ids.stop, (batch, len(layout)), device=device)}
    return Workload(
        model=model,
        adapter=adapter,
        layout=layout,
        batch=batch,
        inputs=inputs,
        raw=_raw_inputs(model, layout, batch),
        decoding=Decoding(adapter, max_captures=max_captures),
    )


def _raw_inputs(model: PreTrainedModel, layout: Layout, batch: int) -> dict[str, Tensor] | None:
    """Ids and random media of VideoLLaMA2, for a prompt with as many tokens as its encoders produce; else None."""
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


def _set_attention(model: PreTrainedModel, attention: str) -> None:
    """Set the decoder's attention.  Raises: UnsupportedModel for attention that the model does not support."""
    if model.config.get_text_config(decoder=True)._attn_implementation == attention:
        return  # setting it again could fail: an encoder may not support it
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise UnsupportedModel(f"{type(model).__name__} cannot run with {attention}: {reason_of(error)}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python raises this error when memory is exhausted."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Return memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _require_memory(spec: ModelSpec, device: torch.device, weights: int) -> None:
    free = _free_bytes(device)
    if free is not None and weights > free:
        raise FastAVError(
            f"the weights of {spec.name} take {weights / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB left",
            "try --dtype bfloat16, or another machine",
        )


def _free_bytes(device: torch.device) -> int | None:
    """Free memory in bytes; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((1024 * int(kilobytes) for kilobytes in available), None)
