"""On a CUDA device: captured steps say what uncaptured ones say, and the host does not wait for them."""

import pytest
import torch

from fastav.engines.transformers import Decoding, prune
from fastav.engines.transformers.generation import loop
from fastav.presets import NONE
from support.cases import PLAN, ROWS
from support.tiny import TinyAdapter, pad_left, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ALONE = {"input_ids": ROWS[0], "attention_mask": torch.ones_like(ROWS[0])}
BATCH = pad_left(ROWS)


class SteadyAdapter(TinyAdapter):
    """Its steps are captured."""

    decode_syncs = False


@pytest.fixture(scope="module")
def model():
    return tiny_model().to("cuda")


def generate(model, inputs, plan, custom, tokens=40, **options):
    there = {name: value.to("cuda") for name, value in inputs.items()}
    with prune(model, plan, adapter=TinyAdapter()):
        return model.generate(
            **there,
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            custom_generate=custom,
            **options,
        )


@pytest.mark.parametrize("inputs", [ALONE, BATCH], ids=["alone", "padded batch"])
@pytest.mark.parametrize("plan", [NONE, PLAN], ids=["unpruned", "pruned"])
def test_captured_steps_say_what_generate_says(model, plan, inputs):
    expected = generate(model, inputs, plan, None)
    for _ in range(2):  # captured, then replayed
        found = generate(model, inputs, plan, Decoding(SteadyAdapter()))
        assert torch.equal(found.sequences, expected.sequences)
        assert (torch.stack(found.logits) - torch.stack(expected.logits)).abs().max() < 1e-3
    assert any(stepper._graph is not None for stepper in loop._steps[model].values())


def test_rows_that_end_are_noticed_late_and_not_told(model):
    whole = generate(model, BATCH, PLAN, None)
    end = whole.sequences[0, BATCH["input_ids"].shape[1] + 5].item()
    options = {"eos_token_id": end, "pad_token_id": 0}
    expected = generate(model, BATCH, PLAN, None, **options)
    found = generate(model, BATCH, PLAN, Decoding(SteadyAdapter()), **options)
    assert torch.equal(found.sequences, expected.sequences)


@torch.inference_mode()
def test_a_replayed_step_does_not_wait(model):
    generate(model, ALONE, PLAN, Decoding(SteadyAdapter()))
    (stepper,) = [one for one in loop._steps[model].values() if one.inputs["input_ids"].shape[0] == 1][:1]
    token = torch.zeros(1, dtype=torch.long, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper(token)
    finally:
        torch.cuda.set_sync_debug_mode("default")
