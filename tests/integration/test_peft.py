"""Models in wrappers of PEFT and DDP are pruned inside, with adapters on, off and merged."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PromptTuningConfig, TaskType, get_peft_model
from torch.nn.parallel import DataParallel

from fastav.engines.transformers import Decoding, prune
from fastav.errors import UnsupportedModel
from integration.test_no_trace import state_of
from support.cases import PLAN, ROWS, rules_of
from support.oracle import oracle_logits
from support.tiny import TinyAdapter, tiny_model

IDS = ROWS[0]
# PEFT asks for an attribute that transformers 5.24 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


def tuned(kind: Any) -> Any:
    torch.manual_seed(1)
    if kind is PeftMixedModel:
        return get_peft_model(tiny_model(), LORA, mixed=True)
    return get_peft_model(tiny_model(), LoraConfig(**LORA.to_dict() | {"task_type": kind}))


def check(outer: Any, inner: Any, **more: Any) -> torch.Tensor:
    """That the wrapper's own `generate` gives the logits of the oracle on weights that `inner` has."""
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), prune(outer, PLAN, adapter=TinyAdapter()):
        out = outer.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options, **more)
        expected = oracle_logits(inner, out.sequences, IDS.shape[1], rules_of(IDS))[IDS.shape[1] - 1 : -1]
    assert (torch.cat(out.logits) - expected).abs().max() < 1e-4
    return torch.cat(out.logits)


@pytest.mark.parametrize("kind", [TaskType.CAUSAL_LM, None, PeftMixedModel], ids=["causal", "plain", "mixed"])
def test_adapters_on_off_and_merged(kind):
    outer = tuned(kind).eval()
    inner = outer.base_model.model
    before = state_of(inner)
    on = check(outer, inner)
    assert (check(outer, inner, custom_generate=Decoding(TinyAdapter())) - on).abs().max() < 1e-4
    with outer.disable_adapter():
        off = check(outer, tiny_model())
    assert (on - off).abs().max() > 1e-2
    assert state_of(inner) == before
    merged = copy.deepcopy(outer).merge_and_unload()
    assert (check(merged, merged) - on).abs().max() < 1e-3


def test_adapters_of_transformers_itself():
    model: Any = tiny_model()
    try:
        model.add_adapter(LORA)
    except ValueError as error:
        if "PEFT you are using is not compatible" in str(error):
            pytest.skip("this release of transformers wants a newer PEFT for adapters of its own")
        raise
    check(model, model)


def test_what_cannot_be_seen_through_is_refused():
    prompts = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    for model, reason in (
        (get_peft_model(tiny_model(), prompts), "tokens before the prompt"),
        (DataParallel(tiny_model()), "not a transformers model"),
    ):
        with pytest.raises(UnsupportedModel, match=reason):
            prune(model, PLAN, adapter=TinyAdapter())
