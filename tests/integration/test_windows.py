"""Sliding windows, in whatever style a configuration tells of them, hold in our own decoding and in what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import Phi4MultimodalForCausalLM

from fastav.budgets import Share, Tokens
from fastav.cache_argument import of_output
from fastav.engines.transformers import Decoding, prune
from fastav.engines.transformers.engine import TransformersEngine
from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.media import Clip
from fastav.models.phi4_multimodal import Phi4MultimodalAdapter
from fastav.plan import Keep, Plan, Step
from fastav.presets import NONE
from fastav.pruning import decoder_layers
from fastav.request import Request
from support import flash
from support.cases import ROWS
from support.families import phi4_multimodal
from support.masked import masked_logits, rules_of
from support.tiny import TinyAdapter, pad_left

DEPTH, STEPS, WINDOW = 4, 6, 9
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
HALF = Keep(media=Share(0.5))
GLOBAL = Plan((Step(layers="2", method="position", keep=Keep(audio=Tokens(4), video=Tokens(14))),))
FINE = Plan((Step(layers="2", method="last-query", keep=HALF),))
CACHES = Plan((Step(layers="2", method="window", keep=HALF, cache_only=True),))
EARLIER = Plan((Step(layers="2", method="last-query", keep=HALF, earlier_caches=True),))

SLIDES, WIDE = [WINDOW] * DEPTH, [None] * DEPTH
EVERY_SECOND, LAST_TWO = [WINDOW, None] * (DEPTH // 2), [None, None, WINDOW, WINDOW]
STYLES = {  # model, its configuration's own settings, the windows of its layers
    "a window for all layers": ("Mistral", {"sliding_window": WINDOW}, SLIDES),
    "no window": ("Mistral", {"sliding_window": None}, WIDE),
    "ministral": ("Ministral3", {"sliding_window": WINDOW}, SLIDES),
    "phi": ("Phi3", {"sliding_window": WINDOW}, SLIDES),
    "starcoder": ("Starcoder2", {"sliding_window": WINDOW}, SLIDES),
    "mixtral": ("Mixtral", {"sliding_window": WINDOW, **EXPERTS}, SLIDES),
    "asked for": ("Qwen3Moe", {"sliding_window": WINDOW, "use_sliding_window": True, **EXPERTS}, SLIDES),
    "not asked for": ("Qwen3Moe", {"sliding_window": WINDOW, "use_sliding_window": False, **EXPERTS}, WIDE),
    "behind some layers": (
        "Qwen2",
        {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
        LAST_TWO,
    ),
    "qwen without": ("Qwen3", {"sliding_window": WINDOW, "use_sliding_window": False}, WIDE),
    "every second layer": ("Gemma2", {"sliding_window": WINDOW, "attn_logit_softcapping": None}, EVERY_SECOND),
    "by a pattern": (
        "Gemma3",
        {"sliding_window": WINDOW, "layer_types": None, "sliding_window_pattern": 2},
        EVERY_SECOND,
    ),
    "by types": (
        "Cohere2",
        {"sliding_window": WINDOW, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2},
        LAST_TWO,
    ),
    "with sinks": ("GptOss", {"sliding_window": WINDOW, **EXPERTS}, EVERY_SECOND),
    "llama": ("Llama", {}, WIDE),
}


def built(style: str, attention: str = "sdpa") -> Any:
    name, settings, _ = STYLES[style]
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**SMALL | settings)
    torch.manual_seed(0)
    if attention == flash.NAME:
        flash.register()
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.config._attn_implementation_internal = "eager" if name == "GptOss" else attention
    return model


def both(model: Any, adapter: Any, inputs: Any, plan: Plan, layouts: Any = None, **options: Any) -> tuple[Any, Any]:
    """What `generate` returns, and what it returns by our loop."""
    options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with prune(model, plan, adapter=adapter, layouts=layouts):
        return model.generate(**inputs, **options), model.generate(
            **inputs, **options, custom_generate=Decoding(adapter)
        )


def difference(expected: Any, found: Any) -> float:
    return float((torch.stack(found.logits) - torch.stack(expected.logits)).abs().max())


@pytest.mark.parametrize("style", STYLES)
def test_windows_are_those_of_the_models_own_cache(style):
    model = built(style)
    assert list(decoder_layers.windows(model.config)) == STYLES[style][2]
    with torch.no_grad():
        cache = of_output(model(ROWS[0], use_cache=True))
    held = [WINDOW - 1 if window else ROWS[0].shape[1] for window in STYLES[style][2]]
    assert [layer.keys.shape[2] for layer in cache.layers] == held


@pytest.mark.parametrize("plan", [NONE, GLOBAL], ids=["unpruned", "pruned"])
@pytest.mark.parametrize("style", STYLES)
def test_our_decoding_says_what_generate_says(style, plan):
    model = built(style)
    for inputs in (pad_left(ROWS[:1]), pad_left(ROWS)):
        expected, found = both(model, TinyAdapter(), inputs, plan)
        assert difference(expected, found) < 1e-4
        assert torch.equal(expected.sequences, found.sequences)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("style", ["a window for all layers", "phi", "asked for"])
def test_every_step_equals_the_masked_model(style, attention):
    model = built(style, attention)
    for ids in ROWS[:2]:
        for out in both(model, TinyAdapter(), pad_left([ids]), GLOBAL):
            n, layout = ids.shape[1], TinyAdapter().layouts(model.config, {"input_ids": ids})[0]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            rules = rules_of(GLOBAL, layout, DEPTH)
            expected = masked_logits(model, model.model.layers, inputs, out.sequences[0, n:], rules)
            assert (torch.cat(out.logits) - expected).abs().max() < 1e-4


def test_phi_4_with_a_window():
    model, processor = phi4_multimodal.build()
    assert isinstance(model, Phi4MultimodalForCausalLM)
    adapter, depth = Phi4MultimodalAdapter(), model.config.num_hidden_layers
    clip = Clip.from_arrays(frames=np.full((1, 24, 32, 3), 90, np.uint8), fps=1)
    prepared = adapter.prepare(processor, [Request(clip=clip, question="?")])
    model.config.sliding_window = WINDOW
    plan = Plan((Step(layers="1/2", method="position", keep=HALF),))
    answers = [both(model, adapter, prepared.inputs, chosen, prepared.layouts) for chosen in (NONE, plan)]
    for (expected, found), rules in zip(answers, ({}, rules_of(plan, prepared.layouts[0], depth)), strict=True):
        scale = torch.stack(expected.logits).abs().max()
        assert difference(expected, found) < 1e-4 * scale
        masked = masked_logits(model, model.model.layers, prepared.inputs, found.sequences[0, -STEPS:], rules)
        assert (torch.cat(found.logits) - masked).abs().max() < 1e-4 * scale
    with pytest.raises(UnsupportedPlan, match="within a window"):
        TransformersEngine.check(model.config, adapter.preset("fastav"), adapter=adapter)


@pytest.mark.parametrize("style", ["a window for all layers", "phi", "starcoder", "asked for", "by types"])
def test_what_a_window_forbids_is_refused_in_every_style(style):
    model = built(style)
    last = Plan((Step(layers="3", method="last-query", keep=HALF),))
    for plan, reason in ((last, "cannot score all tokens"), (CACHES, "its cache holds only the window")):
        with pytest.raises(UnsupportedPlan, match=reason), prune(model, plan, adapter=TinyAdapter()):
            pass
        with pytest.raises(UnsupportedPlan, match=reason):
            TransformersEngine.check(model.config, plan, adapter=TinyAdapter())
    with pytest.raises(UnsupportedPlan, match="stored keys"):
        TransformersEngine.check(model.config, GLOBAL, flash.NAME, adapter=TinyAdapter())


def test_a_window_that_no_sequence_reaches_forbids_nothing():
    model = built("a window for all layers")
    model.config.sliding_window = model.config.max_position_embeddings = ROWS[0].shape[1]
    expected, found = both(model, TinyAdapter(), pad_left(ROWS[:1]), FINE)
    assert difference(expected, found) < 1e-4
    model.config.sliding_window = model.config.max_position_embeddings = ROWS[0].shape[1] - 1
    with pytest.raises(UnsupportedPlan, match="longer than the window"), prune(model, FINE, adapter=TinyAdapter()):
        model.generate(ROWS[0], max_new_tokens=2)


@pytest.mark.parametrize("plan", [CACHES, EARLIER], ids=["caches", "earlier caches"])
def test_the_cache_of_a_window_that_a_prompt_fills_is_not_cut(plan):
    """It holds all tokens but those that no later one sees."""
    model, length = built("a window for all layers"), ROWS[0].shape[1]
    model.config.sliding_window = model.config.max_position_embeddings = length + 1
    expected, found = both(model, TinyAdapter(), pad_left(ROWS[:1]), plan)
    assert difference(expected, found) < 1e-4
    model.config.sliding_window = model.config.max_position_embeddings = length
    refused = pytest.raises(UnsupportedPlan, match=f"{length} tokens fill the window")
    with refused, prune(model, plan, adapter=TinyAdapter()):
        model.generate(ROWS[0], max_new_tokens=2)


def test_attention_in_chunks_is_refused():
    settings = SMALL | EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 8, "num_experts_per_tok": 1}
    model: Any = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**settings)).eval()
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        model.generate(ROWS[0], max_new_tokens=2, custom_generate=Decoding(TinyAdapter()))
    with pytest.raises(UnsupportedModel, match="within chunks"), prune(model, GLOBAL, adapter=TinyAdapter()):
        pass
    model.config.layer_types, model.config.sliding_window = None, None
    assert decoder_layers.layer_types(model.config) == ["chunked_attention"] * DEPTH


@pytest.mark.parametrize("attention", ["sdpa", "eager", flash.NAME])
@pytest.mark.parametrize(
    ("told", "true"), [([None] * DEPTH, WINDOW), ([WINDOW] * DEPTH, None), ([WINDOW + 1] * DEPTH, WINDOW)]
)
def test_a_model_that_does_otherwise_than_its_configuration_says_is_refused(monkeypatch, attention, told, true):
    model = built("a window for all layers", attention)
    model.config.sliding_window = true
    monkeypatch.setattr(decoder_layers, "windows", lambda _: tuple(told))
    with pytest.raises(UnsupportedModel, match="the model's own masks differ"):
        model.generate(ROWS[0], max_new_tokens=4, do_sample=False, custom_generate=Decoding(TinyAdapter()))


def test_what_a_model_does_is_looked_at_once():
    model, forwards = built("a window for all layers"), []
    hook = model.register_forward_hook(lambda *_: forwards.append(None))
    for expected in (1 + 1 + 3, 1 + 3):
        model.generate(ROWS[0], max_new_tokens=4, do_sample=False, custom_generate=Decoding(TinyAdapter()))
        assert len(forwards) == expected
        forwards.clear()
    hook.remove()
