"""The parameters of the release, by name and shape, without its weights."""

import re

import pytest
import torch
from torch import nn

from fastav.models.videollama2 import VideoLlama2Config, VideoLlama2ForConditionalGeneration

# What the original instantiates. `N` is any layer; `LATER` is any connector block but the first.
TABLE = """
model.embed_tokens.weight [152064, 3584]
model.layers.N.self_attn.q_proj.weight [3584, 3584]
model.layers.N.self_attn.q_proj.bias [3584]
model.layers.N.self_attn.k_proj.weight [512, 3584]
model.layers.N.self_attn.k_proj.bias [512]
model.layers.N.self_attn.v_proj.weight [512, 3584]
model.layers.N.self_attn.v_proj.bias [512]
model.layers.N.self_attn.o_proj.weight [3584, 3584]
model.layers.N.mlp.gate_proj.weight [18944, 3584]
model.layers.N.mlp.up_proj.weight [18944, 3584]
model.layers.N.mlp.down_proj.weight [3584, 18944]
model.layers.N.input_layernorm.weight [3584]
model.layers.N.post_attention_layernorm.weight [3584]
model.norm.weight [3584]
model.mm_projector.s1.b1.conv1.conv.weight [3584, 1152, 1, 1]
model.mm_projector.s1.b1.conv1.bn.weight [3584]
model.mm_projector.s1.b1.conv1.bn.bias [3584]
model.mm_projector.s1.b1.conv2.conv.weight [3584, 1, 3, 3]
model.mm_projector.s1.b1.conv2.bn.weight [3584]
model.mm_projector.s1.b1.conv2.bn.bias [3584]
model.mm_projector.s1.b1.se.fc1.weight [288, 3584, 1, 1]
model.mm_projector.s1.b1.se.fc1.bias [288]
model.mm_projector.s1.b1.se.fc2.weight [3584, 288, 1, 1]
model.mm_projector.s1.b1.se.fc2.bias [3584]
model.mm_projector.s1.b1.conv3.conv.weight [3584, 3584, 1, 1]
model.mm_projector.s1.b1.conv3.bn.weight [3584]
model.mm_projector.s1.b1.conv3.bn.bias [3584]
model.mm_projector.s1.b1.downsample.conv.weight [3584, 1152, 1, 1]
model.mm_projector.s1.b1.downsample.bn.weight [3584]
model.mm_projector.s1.b1.downsample.bn.bias [3584]
model.mm_projector.LATER.conv1.conv.weight [3584, 3584, 1, 1]
model.mm_projector.LATER.conv1.bn.weight [3584]
model.mm_projector.LATER.conv1.bn.bias [3584]
model.mm_projector.LATER.conv2.conv.weight [3584, 1, 3, 3]
model.mm_projector.LATER.conv2.bn.weight [3584]
model.mm_projector.LATER.conv2.bn.bias [3584]
model.mm_projector.LATER.se.fc1.weight [896, 3584, 1, 1]
model.mm_projector.LATER.se.fc1.bias [896]
model.mm_projector.LATER.se.fc2.weight [3584, 896, 1, 1]
model.mm_projector.LATER.se.fc2.bias [3584]
model.mm_projector.LATER.conv3.conv.weight [3584, 3584, 1, 1]
model.mm_projector.LATER.conv3.bn.weight [3584]
model.mm_projector.LATER.conv3.bn.bias [3584]
model.mm_projector.sampler.0.weight [3584, 3584, 2, 2, 2]
model.mm_projector.sampler.0.bias [3584]
model.mm_projector.readout.0.weight [3584, 3584]
model.mm_projector.readout.0.bias [3584]
model.mm_projector.readout.2.weight [3584, 3584]
model.mm_projector.readout.2.bias [3584]
model.audio_tower.post_extract_proj.weight [768, 512]
model.audio_tower.post_extract_proj.bias [768]
model.audio_tower.patch_embedding.weight [512, 1, 16, 16]
model.audio_tower.encoder.pos_conv.0.bias [768]
model.audio_tower.encoder.pos_conv.0.weight_g [1, 1, 128]
model.audio_tower.encoder.pos_conv.0.weight_v [768, 48, 128]
model.audio_tower.encoder.layers.N.self_attn.grep_a [1, 12, 1, 1]
model.audio_tower.encoder.layers.N.self_attn.relative_attention_bias.weight [320, 12]
model.audio_tower.encoder.layers.N.self_attn.k_proj.weight [768, 768]
model.audio_tower.encoder.layers.N.self_attn.k_proj.bias [768]
model.audio_tower.encoder.layers.N.self_attn.v_proj.weight [768, 768]
model.audio_tower.encoder.layers.N.self_attn.v_proj.bias [768]
model.audio_tower.encoder.layers.N.self_attn.q_proj.weight [768, 768]
model.audio_tower.encoder.layers.N.self_attn.q_proj.bias [768]
model.audio_tower.encoder.layers.N.self_attn.out_proj.weight [768, 768]
model.audio_tower.encoder.layers.N.self_attn.out_proj.bias [768]
model.audio_tower.encoder.layers.N.self_attn.grep_linear.weight [8, 64]
model.audio_tower.encoder.layers.N.self_attn.grep_linear.bias [8]
model.audio_tower.encoder.layers.N.self_attn_layer_norm.weight [768]
model.audio_tower.encoder.layers.N.self_attn_layer_norm.bias [768]
model.audio_tower.encoder.layers.N.fc1.weight [3072, 768]
model.audio_tower.encoder.layers.N.fc1.bias [3072]
model.audio_tower.encoder.layers.N.fc2.weight [768, 3072]
model.audio_tower.encoder.layers.N.fc2.bias [768]
model.audio_tower.encoder.layers.N.final_layer_norm.weight [768]
model.audio_tower.encoder.layers.N.final_layer_norm.bias [768]
model.audio_tower.encoder.layer_norm.weight [768]
model.audio_tower.encoder.layer_norm.bias [768]
model.audio_tower.layer_norm.weight [512]
model.audio_tower.layer_norm.bias [512]
model.audio_tower.predictor.weight [527, 768]
model.audio_tower.predictor.bias [527]
model.mm_projector_a.0.weight [3584, 768]
model.mm_projector_a.0.bias [3584]
model.mm_projector_a.2.weight [3584, 3584]
model.mm_projector_a.2.bias [3584]
lm_head.weight [152064, 3584]
model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight [1152, 3, 14, 14]
model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.bias [1152]
model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight [729, 1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.self_attn.k_proj.weight [1152, 1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.self_attn.k_proj.bias [1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.self_attn.v_proj.weight [1152, 1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.self_attn.v_proj.bias [1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.self_attn.q_proj.weight [1152, 1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.self_attn.q_proj.bias [1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.self_attn.out_proj.weight [1152, 1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.self_attn.out_proj.bias [1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.layer_norm1.weight [1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.layer_norm1.bias [1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.mlp.fc1.weight [4304, 1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.mlp.fc1.bias [4304]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.mlp.fc2.weight [1152, 4304]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.mlp.fc2.bias [1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.layer_norm2.weight [1152]
model.vision_tower.vision_tower.vision_model.encoder.layers.N.layer_norm2.bias [1152]
model.vision_tower.vision_tower.vision_model.post_layernorm.weight [1152]
model.vision_tower.vision_tower.vision_model.post_layernorm.bias [1152]
model.vision_tower.vision_tower.vision_model.head.probe [1, 1, 1152]
model.vision_tower.vision_tower.vision_model.head.attention.in_proj_weight [3456, 1152]
model.vision_tower.vision_tower.vision_model.head.attention.in_proj_bias [3456]
model.vision_tower.vision_tower.vision_model.head.attention.out_proj.weight [1152, 1152]
model.vision_tower.vision_tower.vision_model.head.attention.out_proj.bias [1152]
model.vision_tower.vision_tower.vision_model.head.layernorm.weight [1152]
model.vision_tower.vision_tower.vision_model.head.layernorm.bias [1152]
model.vision_tower.vision_tower.vision_model.head.mlp.fc1.weight [4304, 1152]
model.vision_tower.vision_tower.vision_model.head.mlp.fc1.bias [4304]
model.vision_tower.vision_tower.vision_model.head.mlp.fc2.weight [1152, 4304]
model.vision_tower.vision_tower.vision_model.head.mlp.fc2.bias [1152]
"""
LAYERS = {"model.layers": 28, "model.audio_tower": 12, "model.vision_tower": 27}
LATER = ("s1.b2", "s1.b3", "s1.b4", "s2.b1", "s2.b2", "s2.b3", "s2.b4")
TOTALS = {
    "model.layers.": 6_525_618_176,
    "model.embed_tokens.": 544_997_376,
    "lm_head.": 544_997_376,
    "model.mm_projector.": 376_889_248,
    "model.audio_tower.": 90_759_295,
    "model.mm_projector_a.": 15_604_736,
    "model.vision_tower.": 428_225_600,
}


@pytest.fixture(scope="module")
def release() -> nn.Module:
    with torch.device("meta"):
        return VideoLlama2ForConditionalGeneration(VideoLlama2Config())


def expected() -> dict[str, tuple[int, ...]]:
    shapes = {}
    for line in TABLE.strip().splitlines():
        name, shape = line.split(" ", 1)
        count = next((n for start, n in LAYERS.items() if name.startswith(start)), 1)
        names = [name.replace(".N.", f".{i}.") for i in range(count)] if ".N." in name else [name]
        names = [name.replace("LATER", block) for block in LATER] if "LATER" in name else names
        shapes |= dict.fromkeys(names, tuple(map(int, re.findall(r"\d+", shape))))
    return shapes


def test_default_configuration_has_the_releases_parameters(release: nn.Module) -> None:
    assert {name: tuple(value.shape) for name, value in release.state_dict().items()} == expected()


@pytest.mark.parametrize(("start", "total"), TOTALS.items())
def test_default_configuration_has_as_many_parameters_as_the_release(
    release: nn.Module, start: str, total: int
) -> None:
    assert sum(value.numel() for name, value in release.state_dict().items() if name.startswith(start)) == total
