"""The parameters of the releases of our own families, by name and shape, without their weights."""

import re
from collections.abc import Iterator
from typing import Any

import torch

from support.native import VIDEO_SALMONN2, VIDEO_SALMONN2_PLUS, VIDEOLLAMA2, Family, each_family

# What the originals instantiate. `N` is any layer; `LATER` is any connector block but the first.
DECODER = """
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
"""
SIGLIP = """
embeddings.patch_embedding.weight [1152, 3, 14, 14]
embeddings.patch_embedding.bias [1152]
embeddings.position_embedding.weight [729, 1152]
encoder.layers.N.self_attn.k_proj.weight [1152, 1152]
encoder.layers.N.self_attn.k_proj.bias [1152]
encoder.layers.N.self_attn.v_proj.weight [1152, 1152]
encoder.layers.N.self_attn.v_proj.bias [1152]
encoder.layers.N.self_attn.q_proj.weight [1152, 1152]
encoder.layers.N.self_attn.q_proj.bias [1152]
encoder.layers.N.self_attn.out_proj.weight [1152, 1152]
encoder.layers.N.self_attn.out_proj.bias [1152]
encoder.layers.N.layer_norm1.weight [1152]
encoder.layers.N.layer_norm1.bias [1152]
encoder.layers.N.mlp.fc1.weight [4304, 1152]
encoder.layers.N.mlp.fc1.bias [4304]
encoder.layers.N.mlp.fc2.weight [1152, 4304]
encoder.layers.N.mlp.fc2.bias [1152]
encoder.layers.N.layer_norm2.weight [1152]
encoder.layers.N.layer_norm2.bias [1152]
post_layernorm.weight [1152]
post_layernorm.bias [1152]
"""
WHISPER = """
conv1.weight [1280, 128, 3]
conv1.bias [1280]
conv2.weight [1280, 1280, 3]
conv2.bias [1280]
embed_positions.weight [1500, 1280]
layers.N.self_attn.k_proj.weight [1280, 1280]
layers.N.self_attn.v_proj.weight [1280, 1280]
layers.N.self_attn.v_proj.bias [1280]
layers.N.self_attn.q_proj.weight [1280, 1280]
layers.N.self_attn.q_proj.bias [1280]
layers.N.self_attn.out_proj.weight [1280, 1280]
layers.N.self_attn.out_proj.bias [1280]
layers.N.self_attn_layer_norm.weight [1280]
layers.N.self_attn_layer_norm.bias [1280]
layers.N.fc1.weight [5120, 1280]
layers.N.fc1.bias [5120]
layers.N.fc2.weight [1280, 5120]
layers.N.fc2.bias [1280]
layers.N.final_layer_norm.weight [1280]
layers.N.final_layer_norm.bias [1280]
layer_norm.weight [1280]
layer_norm.bias [1280]
"""
QFORMER = """
embeddings.LayerNorm.weight [HIDDEN]
embeddings.LayerNorm.bias [HIDDEN]
encoder.layer.N.attention.self.query.weight [HIDDEN, HIDDEN]
encoder.layer.N.attention.self.query.bias [HIDDEN]
encoder.layer.N.attention.self.key.weight [HIDDEN, HIDDEN]
encoder.layer.N.attention.self.key.bias [HIDDEN]
encoder.layer.N.attention.self.value.weight [HIDDEN, HIDDEN]
encoder.layer.N.attention.self.value.bias [HIDDEN]
encoder.layer.N.attention.output.dense.weight [HIDDEN, HIDDEN]
encoder.layer.N.attention.output.dense.bias [HIDDEN]
encoder.layer.N.attention.output.LayerNorm.weight [HIDDEN]
encoder.layer.N.attention.output.LayerNorm.bias [HIDDEN]
encoder.layer.N.crossattention.self.query.weight [HIDDEN, HIDDEN]
encoder.layer.N.crossattention.self.query.bias [HIDDEN]
encoder.layer.N.crossattention.self.key.weight [HIDDEN, 1280]
encoder.layer.N.crossattention.self.key.bias [HIDDEN]
encoder.layer.N.crossattention.self.value.weight [HIDDEN, 1280]
encoder.layer.N.crossattention.self.value.bias [HIDDEN]
encoder.layer.N.crossattention.output.dense.weight [HIDDEN, HIDDEN]
encoder.layer.N.crossattention.output.dense.bias [HIDDEN]
encoder.layer.N.crossattention.output.LayerNorm.weight [HIDDEN]
encoder.layer.N.crossattention.output.LayerNorm.bias [HIDDEN]
encoder.layer.N.intermediate_query.dense.weight [INNER, HIDDEN]
encoder.layer.N.intermediate_query.dense.bias [INNER]
encoder.layer.N.output_query.dense.weight [HIDDEN, INNER]
encoder.layer.N.output_query.dense.bias [HIDDEN]
encoder.layer.N.output_query.LayerNorm.weight [HIDDEN]
encoder.layer.N.output_query.LayerNorm.bias [HIDDEN]
"""
VIDEOLLAMA2_OWN = """
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
VIDEO_SALMONN2_OWN = """
speech_query_tokens [1, 1, 768]
model.image_newline [3584]
model.mm_projector.0.weight [3584, 1152]
model.mm_projector.0.bias [3584]
model.mm_projector.2.weight [3584, 3584]
model.mm_projector.2.bias [3584]
ln_speech.weight [1280]
ln_speech.bias [1280]
speech_Qformer.bert.embeddings.position_ids [1, 512]
speech_llama_proj.weight [3584, 768]
speech_llama_proj.bias [3584]
final_linear.0.weight [3584, 3584]
final_linear.0.bias [3584]
final_linear.2.weight [3584, 3584]
final_linear.2.bias [3584]
"""
VIDEO_SALMONN2_PLUS_OWN = """
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
audio.q_tokens [1, 1, 3072]
audio.audio_proj.weight [3584, 3072]
audio.audio_proj.bias [3584]
"""
LATER = ("s1.b2", "s1.b3", "s1.b4", "s2.b1", "s2.b2", "s2.b3", "s2.b4")
VISION = "model.vision_tower.vision_tower.vision_model."
TABLES: dict[str, dict[str, str]] = {  # by what a table's names begin with
    VIDEOLLAMA2.name: {"": DECODER + VIDEOLLAMA2_OWN, VISION: SIGLIP},
    VIDEO_SALMONN2.name: {
        "": DECODER + VIDEO_SALMONN2_OWN,
        VISION: SIGLIP,
        "speech_encoder.": WHISPER,
        "speech_Qformer.bert.": QFORMER.replace("HIDDEN", "768").replace("INNER", "3072"),
    },
    VIDEO_SALMONN2_PLUS.name: {
        "": DECODER + VIDEO_SALMONN2_PLUS_OWN,
        "audio.": WHISPER,
        "audio.qformer.bert.": QFORMER.replace("HIDDEN", "3072").replace("INNER", "12288"),
    },
}
LAYERS = {
    VIDEOLLAMA2.name: {"model.layers": 28, "model.audio_tower": 12, "model.vision_tower": 27},
    VIDEO_SALMONN2.name: {"model.layers": 28, "speech_encoder": 32, "speech_Qformer": 2, "model.vision_tower": 26},
    VIDEO_SALMONN2_PLUS.name: {"model.layers": 28, "visual.blocks": 32, "audio.layers": 32, "audio.qformer": 2},
}
TOTALS = {
    "model.layers.": 6_525_618_176,
    "model.embed_tokens.": 544_997_376,
    "lm_head.": 544_997_376,
    "model.mm_projector.": 376_889_248,
    "model.audio_tower.": 90_759_295,
    "model.mm_projector_a.": 15_604_736,
    "model.vision_tower.": 428_225_600,
}
MILLIONS = {  # of video-SALMONN 2
    ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."): 7615.6,
    ("model.vision_tower.",): 397.7,
    ("model.mm_projector.",): 17.0,
    ("speech_encoder.",): 637.0,
    ("speech_Qformer.",): 20.5,
    ("speech_llama_proj.",): 2.8,
    ("final_linear.",): 25.7,
}


def release(family: Family) -> Any:
    with torch.device("meta"):
        return family.model_class(family.config_class())


def expected(family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    for prefix, table in TABLES[family.name].items():
        for line in filter(None, table.splitlines()):
            name, shape = (prefix + line).split(" ", 1)
            count = next((n for start, n in LAYERS[family.name].items() if name.startswith(start)), 1)
            names = [name.replace(".N.", f".{i}.") for i in range(count)] if ".N." in name else [name]
            for one in [name.replace("LATER", block) for block in LATER] if "LATER" in name else names:
                yield one, tuple(map(int, re.findall(r"\d+", shape)))


@each_family
def test_default_configuration_has_the_releases_parameters(family: Family) -> None:
    ours = {name: tuple(value.shape) for name, value in release(family).state_dict().items()}
    assert ours == dict(expected(family))
    assert family is not VIDEO_SALMONN2 or len(ours) == 1316


def test_videollama2_has_as_many_parameters_as_its_release() -> None:
    sizes = {name: value.numel() for name, value in release(VIDEOLLAMA2).state_dict().items()}
    for start, total in TOTALS.items():
        assert sum(size for name, size in sizes.items() if name.startswith(start)) == total, start


def test_video_salmonn2_has_as_many_parameters_as_its_release() -> None:
    sizes = {name: value.numel() for name, value in release(VIDEO_SALMONN2).named_parameters()}
    assert sum(sizes.values()) == 8_716_252_448
    for starts, millions in MILLIONS.items():
        total = sum(size for name, size in sizes.items() if name.startswith(starts))
        assert round(total / 1e6, 1) == millions, starts


def test_default_configuration_of_video_salmonn2_plus_is_the_releases() -> None:
    config = VIDEO_SALMONN2_PLUS.config_class()
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert config.text_config.rope_parameters["rope_theta"] == 1_000_000
    assert (config.text_config.rms_norm_eps, config.text_config.eos_token_id) == (1e-6, 151_645)
    assert list(config.vision_config.fullatt_block_indexes) == [7, 15, 23, 31]
    assert (config.video_token_id, config.audio_token_id) == (151_656, 151_665)
    assert not config.tie_word_embeddings
