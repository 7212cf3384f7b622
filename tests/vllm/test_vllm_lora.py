"""LoRA adapters of the decoder: each request's own, also in layers that run on fewer tokens."""

import json

import pytest
import torch
from harness import TOLERANCE, difference, generated, plan_of, record_positions, recorded_positions, sampling
from safetensors.torch import save_file
from test_vllm_exact import GLOBAL, QUESTIONS, SHOWN
from vllm.lora.request import LoRARequest

RANK, ALPHA = 8, 16
MODULES = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def linears(reference):
    """The linear maps of the decoder's layers, by name."""
    layers = reference.model.get_decoder().layers
    for index, layer in enumerate(layers):
        for part, names in MODULES.items():
            for name in names:
                yield f"{index}.{part}.{name}", getattr(getattr(layer, part), name)


def adapter(reference, folder, seed, prefix):
    """Write a random adapter, and return what it adds to each weight."""
    make, weights, added = torch.Generator().manual_seed(seed), {}, {}
    for name, linear in linears(reference):
        down = torch.randn(RANK, linear.in_features, generator=make) * 0.1
        up = torch.randn(linear.out_features, RANK, generator=make) * 0.1
        weights[f"base_model.model.{prefix}.layers.{name}.lora_A.weight"] = down
        weights[f"base_model.model.{prefix}.layers.{name}.lora_B.weight"] = up
        added[name] = up @ down * (ALPHA / RANK)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    targets = [name for names in MODULES.values() for name in names]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def merged(reference, added, questions, plan):
    """The answers of the transformers engine with an adapter merged into the weights."""
    before = {name: linear.weight.clone() for name, linear in linears(reference)}
    kept, reference.cache = reference.cache, {}
    try:
        with torch.no_grad():
            for name, linear in linears(reference):
                linear.weight += added.get(name, 0)
        return [reference(question, plan) for question in questions]
    finally:
        with torch.no_grad():
            for name, linear in linears(reference):
                linear.weight.copy_(before[name])
        reference.cache = kept


@pytest.mark.parametrize(
    ("model", "prefix", "plan"),
    [
        ("omni", "thinker.model", "fastav"),
        ("omni", "thinker.model", GLOBAL["strided"]),
        ("sight", "model.language_model", "fastav"),
    ],
)
def test_each_request_has_its_adapter_in_every_layer(request, engines, tmp_path, model, prefix, plan):
    reference = request.getfixturevalue(model)
    questions = QUESTIONS[:5] if model == "omni" else SHOWN[:5]
    added = [adapter(reference, tmp_path / str(seed), seed, prefix) for seed in (1, 2)] + [{}]
    requests = [LoRARequest(str(n), n + 1, str(tmp_path / str(n + 1))) for n in range(2)] + [None]
    which = [0, 2, 1, 0, 1][: len(questions)]  # in one batch: two adapters, and none
    chosen = plan_of(plan, reference)
    # vLLM's CPU backend gives requests without an adapter the last slot, pruned or not, which is empty here
    options = {"enable_lora": True, "max_loras": 3, "max_lora_rank": RANK}
    with engines.own(reference.folder, plan, **options) as llm:
        record_positions(llm)
        params = [sampling(question.new) for question in questions]
        prompts = [question.for_vllm() for question in questions]
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=[requests[n] for n in which])
        recorded_positions(llm)
    answers = [generated(output) for output in outputs]
    expected = [merged(reference, one, questions, chosen) for one in added]
    for at, (answer, n) in enumerate(zip(answers, which, strict=True)):
        assert difference(answer, expected[n][at]) < TOLERANCE
        others = [expected[other][at][2][0] for other in range(3) if other != n]
        assert all((expected[n][at][2][0] - other).abs().max() > 100 * TOLERANCE for other in others)
