"""The parameters of the release, by name and shape, without its weights."""

import re

import pytest
import torch
from torch import nn

from fastav.models.video_salmonn2 import VideoSalmonn2Config, VideoSalmonn2ForConditionalGeneration

# What the original instantiates. `N` is any layer.
TABLE = """
speech_query_tokens [1, 1, 768]
model.image_newline [3584]
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
model.mm_projector.0.weight [3584, 1152]
model.mm_projector.0.bias [3584]
model.mm_projector.2.weight [3584, 3584]
model.mm_projector.2.bias [3584]
lm_head.weight [152064, 3584]
speech_encoder.conv1.weight [1280, 128, 3]
speech_encoder.conv1.bias [1280]
speech_encoder.conv2.weight [1280, 1280, 3]
speech_encoder.conv2.bias [1280]
speech_encoder.embed_positions.weight [1500, 1280]
speech_encoder.layers.N.self_attn.k_proj.weight [1280, 1280]
speech_encoder.layers.N.self_attn.v_proj.weight [1280, 1280]
speech_encoder.layers.N.self_attn.v_proj.bias [1280]
speech_encoder.layers.N.self_attn.q_proj.weight [1280, 1280]
speech_encoder.layers.N.self_attn.q_proj.bias [1280]
speech_encoder.layers.N.self_attn.out_proj.weight [1280, 1280]
speech_encoder.layers.N.self_attn.out_proj.bias [1280]
speech_encoder.layers.N.self_attn_layer_norm.weight [1280]
speech_encoder.layers.N.self_attn_layer_norm.bias [1280]
speech_encoder.layers.N.fc1.weight [5120, 1280]
speech_encoder.layers.N.fc1.bias [5120]
speech_encoder.layers.N.fc2.weight [1280, 5120]
speech_encoder.layers.N.fc2.bias [1280]
speech_encoder.layers.N.final_layer_norm.weight [1280]
speech_encoder.layers.N.final_layer_norm.bias [1280]
speech_encoder.layer_norm.weight [1280]
speech_encoder.layer_norm.bias [1280]
ln_speech.weight [1280]
ln_speech.bias [1280]
speech_Qformer.bert.embeddings.position_ids [1, 512]
speech_Qformer.bert.embeddings.LayerNorm.weight [768]
speech_Qformer.bert.embeddings.LayerNorm.bias [768]
speech_Qformer.bert.encoder.layer.N.attention.self.query.weight [768, 768]
speech_Qformer.bert.encoder.layer.N.attention.self.query.bias [768]
speech_Qformer.bert.encoder.layer.N.attention.self.key.weight [768, 768]
speech_Qformer.bert.encoder.layer.N.attention.self.key.bias [768]
speech_Qformer.bert.encoder.layer.N.attention.self.value.weight [768, 768]
speech_Qformer.bert.encoder.layer.N.attention.self.value.bias [768]
speech_Qformer.bert.encoder.layer.N.attention.output.dense.weight [768, 768]
speech_Qformer.bert.encoder.layer.N.attention.output.dense.bias [768]
speech_Qformer.bert.encoder.layer.N.attention.output.LayerNorm.weight [768]
speech_Qformer.bert.encoder.layer.N.attention.output.LayerNorm.bias [768]
speech_Qformer.bert.encoder.layer.N.crossattention.self.query.weight [768, 768]
speech_Qformer.bert.encoder.layer.N.crossattention.self.query.bias [768]
speech_Qformer.bert.encoder.layer.N.crossattention.self.key.weight [768, 1280]
speech_Qformer.bert.encoder.layer.N.crossattention.self.key.bias [768]
speech_Qformer.bert.encoder.layer.N.crossattention.self.value.weight [768, 1280]
speech_Qformer.bert.encoder.layer.N.crossattention.self.value.bias [768]
speech_Qformer.bert.encoder.layer.N.crossattention.output.dense.weight [768, 768]
speech_Qformer.bert.encoder.layer.N.crossattention.output.dense.bias [768]
speech_Qformer.bert.encoder.layer.N.crossattention.output.LayerNorm.weight [768]
speech_Qformer.bert.encoder.layer.N.crossattention.output.LayerNorm.bias [768]
speech_Qformer.bert.encoder.layer.N.intermediate_query.dense.weight [3072, 768]
speech_Qformer.bert.encoder.layer.N.intermediate_query.dense.bias [3072]
speech_Qformer.bert.encoder.layer.N.output_query.dense.weight [768, 3072]
speech_Qformer.bert.encoder.layer.N.output_query.dense.bias [768]
speech_Qformer.bert.encoder.layer.N.output_query.LayerNorm.weight [768]
speech_Qformer.bert.encoder.layer.N.output_query.LayerNorm.bias [768]
speech_llama_proj.weight [3584, 768]
speech_llama_proj.bias [3584]
final_linear.0.weight [3584, 3584]
final_linear.0.bias [3584]
final_linear.2.weight [3584, 3584]
final_linear.2.bias [3584]
"""
LAYERS = {"model.layers": 28, "speech_encoder": 32, "speech_Qformer": 2, "model.vision_tower": 26}
TOTALS = {  # in millions
    "model.vision_tower.": 397.7,
    "model.mm_projector.": 17.0,
    "speech_encoder.": 637.0,
    "speech_Qformer.": 20.5,
    "speech_llama_proj.": 2.8,
    "final_linear.": 25.7,
}
DECODER = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")


@pytest.fixture(scope="module")
def release() -> nn.Module:
    with torch.device("meta"):
        return VideoSalmonn2ForConditionalGeneration(VideoSalmonn2Config())


def expected() -> dict[str, tuple[int, ...]]:
    shapes = {}
    for line in TABLE.strip().splitlines():
        name, shape = line.split(" ", 1)
        count = next((n for start, n in LAYERS.items() if name.startswith(start)), 1)
        names = [name.replace(".N.", f".{i}.") for i in range(count)] if ".N." in name else [name]
        shapes |= dict.fromkeys(names, tuple(map(int, re.findall(r"\d+", shape))))
    return shapes


def total(model: nn.Module, *starts: str) -> int:
    return sum(value.numel() for name, value in model.named_parameters() if name.startswith(starts))


def test_default_configuration_has_the_releases_parameters(release: nn.Module) -> None:
    assert {name: tuple(value.shape) for name, value in release.state_dict().items()} == expected()
    assert len(release.state_dict()) == 1316


def test_default_configuration_has_as_many_parameters_as_the_release(release: nn.Module) -> None:
    assert total(release, "") == 8_716_252_448


@pytest.mark.parametrize(("start", "millions"), TOTALS.items())
def test_parts_have_as_many_parameters_as_the_releases(release: nn.Module, start: str, millions: float) -> None:
    assert round(total(release, start) / 1e6, 1) == millions


def test_decoder_has_as_many_parameters_as_the_releases(release: nn.Module) -> None:
    assert round(total(release, *DECODER) / 1e6, 1) == 7615.6
