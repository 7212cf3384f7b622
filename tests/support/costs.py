"""What a prefill really costs: the bytes that its cache holds, and the operations that PyTorch counts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastav.adapter import ModelAdapter
from fastav.budgets import Share
from fastav.cache_argument import of_output
from fastav.engine import Answer
from fastav.engines.transformers import TransformersEngine
from fastav.plan import Keep, Plan, Step
from fastav.request import Request


def cached_alone(adapter: ModelAdapter, config: Any) -> Plan:
    """A plan that drops from caches alone, of the layers that have one and attend to everything."""
    shape = adapter.shape(config)
    layers = [layer for layer in range(shape.own_kv_layers) if not (shape.windows and shape.windows[layer])]
    keep = Keep(media=Share(0.3))
    steps = [Step(layers=str(layer), method="last-query", keep=keep, cache_only=True) for layer in layers]
    return Plan(tuple(steps), "caches")


def answered(engine: TransformersEngine, requests: Sequence[Request], plan: Plan) -> tuple[tuple[Answer, ...], int]:
    """Answers, and the bytes of keys and values that all layers held when the prompts were read."""
    held = []

    def look(module: Any, args: Any, output: Any) -> None:
        if not held:
            cache = of_output(output)
            layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
            held.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))

    hook = engine.model.register_forward_hook(look)
    try:
        answers = engine.generate(requests, plan, max_new_tokens=1)
    finally:
        hook.remove()
    return answers, held[0]


def counted_flops(model: Any, layers: Sequence[Any], inputs: dict[str, Any]) -> int:
    """Operations of all layers' attention and MLP, and of the head on one token, as PyTorch counts them.

    Routers of experts are left out. Of fused kernels on the CPU PyTorch counts nothing: take eager attention.
    """
    names = ("self_attn", "mlp", "experts")
    parts = {id(part): 1 for layer in layers for name in names if (part := getattr(layer, name, None)) is not None}
    parts |= {id(layer.mlp.gate): -1 for layer in layers if hasattr(layer.mlp, "gate")}
    signs = {name: parts[id(module)] for name, module in model.named_modules() if id(module) in parts}
    model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
        model(**inputs)  # of all tokens: layers that share keys may run on those alone whose logits are asked for
    total = 0
    for name, operations in counter.get_flop_counts().items():
        total += signs.get(name.split(".", 1)[-1], 0) * sum(operations.values())
    head = model.get_output_embeddings()
    return total + 2 * head.in_features * head.out_features
