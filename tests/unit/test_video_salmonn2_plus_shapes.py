"""The parameters of the released 7B, by name and shape, without its weights."""

import re

import pytest
import torch
from torch import nn

from fastav.models.video_salmonn2_plus import VideoSalmonn2PlusConfig, VideoSalmonn2PlusForConditionalGeneration

# What the original instantiates. `N` is any layer.
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
lm_head.weight [152064, 3584]
visual.patch_embed.proj.weight [1280, 3, 2, 14, 14]
visual.blocks.N.norm1.weight [1280]
visual.blocks.N.norm2.weight [1280]
visual.blocks.N.attn.qkv.weight [3840, 1280]
visual.blocks.N.attn.qkv.bias [3840]
visual.blocks.N.attn.proj.weight [1280, 1280]
visual.blocks.N.attn.proj.bias [1280]
visual.blocks.N.mlp.gate_proj.weight [3420, 1280]
visual.blocks.N.mlp.gate_proj.bias [3420]
visual.blocks.N.mlp.up_proj.weight [3420, 1280]
visual.blocks.N.mlp.up_proj.bias [3420]
visual.blocks.N.mlp.down_proj.weight [1280, 3420]
visual.blocks.N.mlp.down_proj.bias [1280]
visual.merger.ln_q.weight [1280]
visual.merger.mlp.0.weight [5120, 5120]
visual.merger.mlp.0.bias [5120]
visual.merger.mlp.2.weight [3584, 5120]
visual.merger.mlp.2.bias [3584]
audio.conv1.weight [1280, 128, 3]
audio.conv1.bias [1280]
audio.conv2.weight [1280, 1280, 3]
audio.conv2.bias [1280]
audio.embed_positions.weight [1500, 1280]
audio.layers.N.self_attn.k_proj.weight [1280, 1280]
audio.layers.N.self_attn.v_proj.weight [1280, 1280]
audio.layers.N.self_attn.v_proj.bias [1280]
audio.layers.N.self_attn.q_proj.weight [1280, 1280]
audio.layers.N.self_attn.q_proj.bias [1280]
audio.layers.N.self_attn.out_proj.weight [1280, 1280]
audio.layers.N.self_attn.out_proj.bias [1280]
audio.layers.N.self_attn_layer_norm.weight [1280]
audio.layers.N.self_attn_layer_norm.bias [1280]
audio.layers.N.fc1.weight [5120, 1280]
audio.layers.N.fc1.bias [5120]
audio.layers.N.fc2.weight [1280, 5120]
audio.layers.N.fc2.bias [1280]
audio.layers.N.final_layer_norm.weight [1280]
audio.layers.N.final_layer_norm.bias [1280]
audio.layer_norm.weight [1280]
audio.layer_norm.bias [1280]
audio.q_tokens [1, 1, 3072]
audio.audio_proj.weight [3584, 3072]
audio.audio_proj.bias [3584]
audio.qformer.bert.embeddings.LayerNorm.weight [3072]
audio.qformer.bert.embeddings.LayerNorm.bias [3072]
audio.qformer.bert.encoder.layer.N.attention.self.query.weight [3072, 3072]
audio.qformer.bert.encoder.layer.N.attention.self.query.bias [3072]
audio.qformer.bert.encoder.layer.N.attention.self.key.weight [3072, 3072]
audio.qformer.bert.encoder.layer.N.attention.self.key.bias [3072]
audio.qformer.bert.encoder.layer.N.attention.self.value.weight [3072, 3072]
audio.qformer.bert.encoder.layer.N.attention.self.value.bias [3072]
audio.qformer.bert.encoder.layer.N.attention.output.dense.weight [3072, 3072]
audio.qformer.bert.encoder.layer.N.attention.output.dense.bias [3072]
audio.qformer.bert.encoder.layer.N.attention.output.LayerNorm.weight [3072]
audio.qformer.bert.encoder.layer.N.attention.output.LayerNorm.bias [3072]
audio.qformer.bert.encoder.layer.N.crossattention.self.query.weight [3072, 3072]
audio.qformer.bert.encoder.layer.N.crossattention.self.query.bias [3072]
audio.qformer.bert.encoder.layer.N.crossattention.self.key.weight [3072, 1280]
audio.qformer.bert.encoder.layer.N.crossattention.self.key.bias [3072]
audio.qformer.bert.encoder.layer.N.crossattention.self.value.weight [3072, 1280]
audio.qformer.bert.encoder.layer.N.crossattention.self.value.bias [3072]
audio.qformer.bert.encoder.layer.N.crossattention.output.dense.weight [3072, 3072]
audio.qformer.bert.encoder.layer.N.crossattention.output.dense.bias [3072]
audio.qformer.bert.encoder.layer.N.crossattention.output.LayerNorm.weight [3072]
audio.qformer.bert.encoder.layer.N.crossattention.output.LayerNorm.bias [3072]
audio.qformer.bert.encoder.layer.N.intermediate_query.dense.weight [12288, 3072]
audio.qformer.bert.encoder.layer.N.intermediate_query.dense.bias [12288]
audio.qformer.bert.encoder.layer.N.output_query.dense.weight [3072, 12288]
audio.qformer.bert.encoder.layer.N.output_query.dense.bias [3072]
audio.qformer.bert.encoder.layer.N.output_query.LayerNorm.weight [3072]
audio.qformer.bert.encoder.layer.N.output_query.LayerNorm.bias [3072]
"""
LAYERS = {"model.layers": 28, "visual.blocks": 32, "audio.layers": 32, "audio.qformer": 2}


@pytest.fixture(scope="module")
def release() -> nn.Module:
    with torch.device("meta"):
        return VideoSalmonn2PlusForConditionalGeneration(VideoSalmonn2PlusConfig())


def expected() -> dict[str, tuple[int, ...]]:
    shapes = {}
    for line in TABLE.strip().splitlines():
        name, shape = line.split(" ", 1)
        count = next((n for start, n in LAYERS.items() if name.startswith(start)), 1)
        names = [name.replace(".N.", f".{i}.") for i in range(count)] if ".N." in name else [name]
        shapes |= dict.fromkeys(names, tuple(map(int, re.findall(r"\d+", shape))))
    return shapes


def test_default_configuration_has_the_releases_parameters(release: nn.Module) -> None:
    assert {name: tuple(value.shape) for name, value in release.state_dict().items()} == expected()


def test_default_configuration_is_the_releases() -> None:
    config = VideoSalmonn2PlusConfig()
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert config.text_config.rope_parameters["rope_theta"] == 1_000_000
    assert (config.text_config.rms_norm_eps, config.text_config.eos_token_id) == (1e-6, 151_645)
    assert list(config.vision_config.fullatt_block_indexes) == [7, 15, 23, 31]
    assert (config.video_token_id, config.audio_token_id) == (151_656, 151_665)
    assert not config.tie_word_embeddings
