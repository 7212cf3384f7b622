"""The untrained model: vocabulary and initial weights; checkpoints for longer clips."""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from fastav.models.tiny import FastAVTinyForConditionalGeneration
from fastav.models.tiny_long import FastAVTinyLongForConditionalGeneration
from fastav.models.videollama2 import Scheme, VideoLlama2Config, VideoLlama2Processor
from training.world import World

PAD, UNKNOWN, END, USER, MODEL = "<|pad|>", "<|unknown|>", "<|end|>", "<|user|>", "<|model|>"
SPECIAL = (PAD, UNKNOWN, END, USER, MODEL)
TEMPLATE = (
    "{% for message in messages %}{{ '<|user|>' if message['role'] == 'user' else '<|model|>' }}"
    "{{ message['content'] }}{% if message['role'] != 'user' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|model|>' }}{% endif %}"
)
WORD = r"\w+|[^\w\s]"


def tokenizer(sentences: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word and mark of these sentences, in lower case."""
    words = dict.fromkeys(word for sentence in sentences for word in re.findall(WORD, sentence))
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, MODEL],
        clean_up_tokenization_spaces=False,
    )


def lengthened(scheme: Scheme, seconds: int) -> Scheme:
    """The scheme for clips of this length, with the same frame rate and the whole sound."""
    if seconds == scheme.audio_seconds:
        return scheme
    frames = scheme.num_frames * seconds // scheme.audio_seconds
    return replace(scheme, num_frames=frames, most_frames=frames, audio_seconds=seconds, clip_seconds=seconds)


def for_long_clips(model: Path, out: Path, seconds: int) -> None:
    """Write the checkpoint `out` for clips of this length, which refers to the weights of `model`.

    model: a saved model, in the same folder as `out`.
    """
    scheme = lengthened(VideoLlama2Config.from_pretrained(model).scheme, seconds)
    name = FastAVTinyLongForConditionalGeneration.__name__
    _refer(model, out, scheme, {"audio_clip_seconds": scheme.clip_seconds, "architectures": [name]})


def interleaved(model: Path, out: Path) -> None:
    """Write the checkpoint `out`, which is `model` with the sound between the pairs of frames."""
    _refer(model, out, replace(VideoLlama2Config.from_pretrained(model).scheme, interleaved=True), {})


def _refer(model: Path, out: Path, scheme: Scheme, others: dict[str, object]) -> None:
    """Write a checkpoint with this scheme and these other settings, which refers to the weights of `model`."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    config = json.loads((model / "config.json").read_text())
    config |= {name: getattr(scheme, name) for name in ("num_frames", "most_frames", "audio_seconds")} | others
    if scheme.interleaved:
        config["interleaved"] = True
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = json.loads((model / "processor_config.json").read_text())
    processor["scheme"] = asdict(scheme)
    (out / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    weights, listed = model / "model.safetensors", model / "model.safetensors.index.json"
    if listed.exists():  # it refers to another's weights itself
        return
    with safe_open(weights, framework="pt") as tensors:
        where = dict.fromkeys(tensors.keys(), f"../{model.name}/{weights.name}")
    index = {"metadata": {"total_size": weights.stat().st_size}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def untrained(seed: int, world: World) -> tuple[FastAVTinyForConditionalGeneration, VideoLlama2Processor]:
    """The world's model with random weights, and its processor.

    If the world says so, queries of each attention head start equal to its keys, so that a word finds tokens like it.

    Source of that: arXiv:2305.09828 (mimetic initialization). Differs: equal weights instead of a product near one.
    """
    torch.manual_seed(seed)
    words = tokenizer(world.sentences())
    config = world.configuration(words)
    model = FastAVTinyForConditionalGeneration(config)
    decoder, width = model.model, config.hidden_size
    nn.init.normal_(decoder.embed_tokens.weight, std=0.1)
    for name, weight in decoder.layers.named_parameters():
        if weight.ndim == 2:  # writes to the residual stream shrink with depth
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.8 * width**-0.5 * ((2 * config.num_hidden_layers) ** -0.5 if adds else 1))
    if world.matching:
        heads = config.num_attention_heads // config.num_key_value_heads
        for layer in decoder.layers:
            attends = layer.self_attn
            keys = attends.k_proj.weight.detach().unflatten(0, (-1, attends.head_dim))
            attends.q_proj.weight.data = keys.repeat_interleave(heads, 0).flatten(0, 1).clone()
    for part in (decoder.vision_tower, decoder.mm_projector, decoder.audio_tower, decoder.mm_projector_a):
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    scheme = {name: getattr(config.scheme, name) for name in config.scheme.__slots__}
    processor = VideoLlama2Processor(words, chat_template=TEMPLATE, scheme=scheme)
    model.lm_head.weight = decoder.embed_tokens.weight
    return model, processor
