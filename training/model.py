"""The untrained model: configuration, vocabulary and initial weights."""

import json
import re
import shutil
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
from fastav.world import LONG_SECONDS, sentences

PAD, UNKNOWN, END, USER, MODEL = "<|pad|>", "<|unknown|>", "<|end|>", "<|user|>", "<|model|>"
SPECIAL = (PAD, UNKNOWN, END, USER, MODEL)
TEMPLATE = (
    "{% for message in messages %}{{ '<|user|>' if message['role'] == 'user' else '<|model|>' }}"
    "{{ message['content'] }}{% if message['role'] != 'user' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|model|>' }}{% endif %}"
)
WORD = r"\w+|[^\w\s]"


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word and mark of the toy world, in lower case."""
    words = dict.fromkeys(word for sentence in sentences() for word in re.findall(WORD, sentence))
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


def configuration(words: PreTrainedTokenizerFast) -> VideoLlama2Config:
    """Three million parameters. A short clip has 64 video and 72 audio tokens, a long one 512 and 597."""
    return VideoLlama2Config(
        vocab_size=len(words) + 2,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        mm_vision_tower="siglip-tiny-patch8",
        mm_vision_select_layer=-1,
        mm_hidden_size=96,
        mm_audio_tower=None,
        mm_hidden_size_a=128,
        hidden_size_a=128,
        num_frames=8,
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "vision_use_head": False,
        },
        beats_config={
            "embed_dim": 128,
            "encoder_layers": 2,
            "encoder_embed_dim": 128,
            "encoder_ffn_embed_dim": 256,
            "encoder_attention_heads": 4,
            "conv_pos": 16,
            "conv_pos_groups": 4,
            "num_buckets": 32,
            "max_distance": 64,
            "predictor_class": 15,  # used in training only: see labels.py
        },
        stc_depth=1,
        stc_mlp_depth=2,
        audio_seconds=4,
        audio_clips=1,
        audio_clip_seconds=4,
        num_mel_bins=48,
    )


def lengthened(scheme: Scheme) -> Scheme:
    """The scheme for long clips, with the same frame rate and the whole sound."""
    frames = scheme.num_frames * LONG_SECONDS // scheme.audio_seconds
    return replace(scheme, num_frames=frames, most_frames=frames, audio_seconds=LONG_SECONDS, clip_seconds=LONG_SECONDS)


def for_long_clips(model: Path, out: Path) -> None:
    """Write the checkpoint `out` for long clips, which refers to the weights of `model`.

    model: a saved model, in the same folder as `out`.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    config = json.loads((model / "config.json").read_text())
    scheme = lengthened(VideoLlama2Config.from_pretrained(model).scheme)
    config |= {
        "num_frames": scheme.num_frames,
        "most_frames": scheme.most_frames,
        "audio_seconds": scheme.audio_seconds,
    }
    config |= {
        "audio_clip_seconds": scheme.clip_seconds,
        "architectures": [FastAVTinyLongForConditionalGeneration.__name__],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = json.loads((model / "processor_config.json").read_text())
    processor["scheme"] = asdict(scheme)
    (out / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    weights = model / "model.safetensors"
    with safe_open(weights, framework="pt") as tensors:
        where = dict.fromkeys(tensors.keys(), f"../{model.name}/{weights.name}")
    index = {"metadata": {"total_size": weights.stat().st_size}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def untrained(seed: int) -> tuple[FastAVTinyForConditionalGeneration, VideoLlama2Processor]:
    """The model with random weights, and its processor."""
    torch.manual_seed(seed)
    words = tokenizer()
    config = configuration(words)
    model = FastAVTinyForConditionalGeneration(config)
    decoder, width = model.model, config.hidden_size
    nn.init.normal_(decoder.embed_tokens.weight, std=0.1)
    for name, weight in decoder.layers.named_parameters():
        if weight.ndim == 2:  # writes to the residual stream shrink with depth
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.8 * width**-0.5 * ((2 * config.num_hidden_layers) ** -0.5 if adds else 1))
    for part in (decoder.vision_tower, decoder.mm_projector, decoder.audio_tower, decoder.mm_projector_a):
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    scheme = {name: getattr(config.scheme, name) for name in config.scheme.__slots__}
    processor = VideoLlama2Processor(words, chat_template=TEMPLATE, scheme=scheme)
    model.lm_head.weight = decoder.embed_tokens.weight
    return model, processor
