"""Decoder layers that something wraps, as `torch.compile(layer)` does, are pruned as they are without."""

import functools
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import compile_regions
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fastav.engines.transformers import Decoding, prune
from fastav.engines.transformers.compiled_layers import compiled, is_compiled
from fastav.errors import UnsupportedModel, UnsupportedPlan
from support.cases import PLAN, ROWS
from support.tiny import TinyAdapter, pad_left, tiny_model

INPUTS = pad_left(ROWS[:2])
# what the compiler itself imports warns of torch's own past
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def small_model() -> Any:
    return tiny_model(num_hidden_layers=3)


WRAPPED = {"disable": True}  # wrapped as a compiled layer is, and run as it stands: compiling takes its time


def one_by_one(model: Any, **how: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, **(how or WRAPPED))
    return model


def in_place(model: Any, **how: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(**how)
    return model


def by_regions(model: Any, **how: Any) -> Any:
    return compile_regions(model, **(how or WRAPPED))


def checkpointed(model: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    return model


def hooked(model: Any) -> Any:
    for layer in model.model.layers:
        add_hook_to_module(layer, ModelHook())
    return model


def decorated(model: Any) -> Any:
    def around(plain: Any) -> Any:
        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs)

        return forward

    for layer in model.model.layers:
        layer.forward = around(layer.forward)
    return model


def answered(model: Any, **more: Any) -> tuple[torch.Tensor, Any]:
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with prune(model, PLAN, adapter=TinyAdapter()) as pruning:
        out = model.generate(**INPUTS, **options, **more)
    return torch.stack(out.logits), pruning.tokens()


@pytest.fixture(scope="module")
def expected():
    return answered(small_model())


@pytest.mark.parametrize("wrap", [one_by_one, by_regions, checkpointed, hooked, decorated])
def test_wrapped_layers_are_pruned_as_they_are_without(wrap, expected):
    model = wrap(small_model())
    with torch.no_grad():
        before = model(**INPUTS).logits
    for options in ({}, {"custom_generate": Decoding(TinyAdapter())}):
        logits, kept = answered(model, **options)
        assert kept == expected[1]
        assert (logits - expected[0]).abs().max() < 1e-4
    with torch.no_grad():
        assert torch.equal(model(**INPUTS).logits, before)


@pytest.mark.parametrize(
    ("compile_", "backend"),
    [
        (in_place, "eager"),
        *(pytest.param(one, "eager", marks=pytest.mark.slow) for one in (one_by_one, by_regions)),
        *(pytest.param(one, "inductor", marks=pytest.mark.slow) for one in (one_by_one, in_place, by_regions)),
    ],
)
def test_compiled_layers_are_pruned_as_they_are_without(compile_, backend, expected):
    model = compile_(small_model(), backend=backend)
    with torch.no_grad():
        model(**INPUTS)  # what was compiled without pruning must not serve while pruning
    logits, kept = answered(model)
    assert kept == expected[1]
    assert (logits - expected[0]).abs().max() < 1e-4
    torch._dynamo.reset()


def test_a_model_and_its_compiled_copy_are_not_pruned_at_once():
    model = small_model()
    copy = by_regions(model)
    with prune(model, PLAN, adapter=TinyAdapter()), pytest.raises(UnsupportedPlan, match="pruned already"):
        answered(copy)


def test_norms_in_compiled_layers_are_found():
    model = one_by_one(small_model())
    assert not is_compiled(model.model)
    with compiled(model.model):
        assert is_compiled(model.model)


def test_what_is_no_decoder_layer_is_refused_in_words():
    model = small_model()
    model.model.layers[0].forward = lambda *args, **kwargs: args[0]
    with pytest.raises(UnsupportedModel, match="takes no hidden_states"), prune(model, PLAN, adapter=TinyAdapter()):
        pass
