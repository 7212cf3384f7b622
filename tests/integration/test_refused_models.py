"""Models whose layers mix tokens by more than attention are refused, and the error says why."""

from typing import Any

import pytest
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from fastav import token_mixing
from fastav.adapter import adapter_for
from fastav.budgets import Share
from fastav.engines.transformers import prune
from fastav.errors import UnsupportedModel
from fastav.pipelines import resolve
from fastav.plan import Keep, Plan, Step
from support.tiny import TinyAdapter, tiny_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PLAN = Plan((Step(layers="1", method="position", keep=Keep(media=Share(0.5))),))


def mamba() -> Any:
    settings = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64}
    return FalconH1ForCausalLM(FalconH1Config(**SIZES, head_dim=8, **settings))


def some_mamba() -> Any:
    layers = {"attn_layer_indices": [3], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    return BambaForCausalLM(BambaConfig(**SIZES, **layers))


def nemotron() -> Any:
    sizes = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "head_dim": 8}
    return NemotronHForCausalLM(NemotronHConfig(**SIZES, **sizes, hybrid_override_pattern="*-M*"))


def convolutions() -> Any:
    return Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["full_attention", "conv", "full_attention", "conv"]))


def linear_attention() -> Any:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "head_dim": 8}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, **experts, **heads))


def indexed() -> Any:
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    index = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_group": 1}
    sizes = {**SIZES, "num_key_value_heads": 4}
    return DeepseekV32ForCausalLM(DeepseekV32Config(**sizes, **ranks, **index, **experts, topk_group=1))


CASES = [
    (mamba, token_mixing.STATE),
    (some_mamba, token_mixing.STATE),
    (nemotron, token_mixing.STATE),
    (convolutions, token_mixing.NEIGHBOURS),
    (linear_attention, token_mixing.STATE),
    (indexed, token_mixing.INDEXED),
]


@pytest.mark.parametrize(("make", "why"), CASES)
def test_they_are_refused_with_and_without_an_adapter(make, why):
    model = make()
    with pytest.raises(UnsupportedModel) as refused, prune(model, PLAN):
        pass
    assert why in str(refused.value)
    with pytest.raises(UnsupportedModel) as refused, prune(model, PLAN, adapter=TinyAdapter()):
        pass
    assert why in str(refused.value)


@pytest.mark.parametrize(("make", "why"), CASES)
def test_a_checkpoint_of_theirs_is_refused_before_weights_load(make, why, tmp_path):
    model = make()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel) as refused:
        resolve(str(tmp_path))
    assert why in str(refused.value)


def test_layers_are_looked_at_even_if_the_configuration_says_nothing():
    model = convolutions()
    assert [token_mixing.of_layer(layer) for layer in model.model.layers] == [None, token_mixing.NEIGHBOURS] * 2
    assert all(token_mixing.of_layer(layer) is None for layer in tiny_model().model.layers)


def test_encoders_may_mix_what_they_like():
    config = {
        "audio_config": {"layer_types": ["conv"], "mamba_d_state": 8},
        "text_config": {"layer_types": ["full_attention"]},
    }
    assert token_mixing.of_config(config) is None
    assert token_mixing.of_types(["full_attention", "sliding_attention"]) is None
    assert "of type novel" in str(token_mixing.of_types(["novel"]))


def test_another_unknown_model_is_told_what_is_known_and_how_to_add_it():
    with pytest.raises(UnsupportedModel, match="no adapter knows the architecture LlamaForCausalLM") as refused:
        adapter_for(["LlamaForCausalLM"], {"layer_types": ["full_attention"]})
    assert "videollama2" in refused.value.hint
    assert "docs/adapters.md" in refused.value.hint
