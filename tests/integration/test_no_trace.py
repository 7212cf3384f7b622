"""Pruning leaves the model, the library and other threads as they were."""

import threading

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastav.engines.transformers import prune
from fastav.errors import UnsupportedPlan
from support.cases import PLAN, ROWS, generate
from support.tiny import TinyAdapter, pad_left, tiny_model

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")


def state_of(model):
    modules = {
        name: (sorted(vars(module)), [len(getattr(module, hook)) for hook in HOOKS])
        for name, module in model.named_modules()
    }
    return modules, sorted(model.state_dict()), sorted(vars(ALL_ATTENTION_FUNCTIONS)), model.config.to_dict()


def logits(model):
    with torch.no_grad():
        return model(**pad_left(ROWS)).logits


def test_the_model_is_restored_after_a_normal_exit():
    model = tiny_model()
    before, plain = state_of(model), logits(model)
    with prune(model, PLAN, adapter=TinyAdapter()):
        assert state_of(model) != before
        assert not torch.equal(logits(model), plain)
    assert state_of(model) == before
    assert torch.equal(logits(model), plain)


def fail(*_):
    raise RuntimeError("on purpose")


def fail_in_a_layer(model):
    handle = model.model.layers[4].mlp.register_forward_hook(fail)
    try:
        logits(model)
    finally:
        handle.remove()


def fail_before_the_first_layer(model):
    model(ROWS[0])  # with gradients, which is refused


@pytest.mark.parametrize("failing", [fail, fail_in_a_layer, fail_before_the_first_layer])
def test_the_model_is_restored_after_an_exception(failing):
    model = tiny_model()
    before, plain = state_of(model), logits(model)
    with pytest.raises((RuntimeError, UnsupportedPlan)), prune(model, PLAN, adapter=TinyAdapter()):
        failing(model)
    assert state_of(model) == before
    assert torch.equal(logits(model), plain)


def test_after_a_failed_forward_the_next_one_is_right():
    model = tiny_model()
    with prune(model, PLAN, adapter=TinyAdapter()):
        expected = logits(model)
        handle = model.model.layers[4].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model)
        handle.remove()
        assert torch.equal(logits(model), expected)


def test_two_threads_with_two_models_do_not_disturb_each_other():
    models = [tiny_model(seed=seed) for seed in (0, 1)]
    inputs = pad_left(ROWS)
    alone = [generate(model, inputs)[0].logits[0] for model in models]
    results: dict[int, list] = {0: [], 1: []}

    def work(index):
        for _ in range(5):
            results[index].append(generate(models[index], inputs)[0].logits[0])

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(results[index]) == 5
        assert all((result - alone[index]).abs().max() < 1e-4 for result in results[index])
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_one_pruned_model_serves_two_threads():
    model = tiny_model()
    with prune(model, PLAN, adapter=TinyAdapter()):
        expected = [model.generate(row, max_new_tokens=4, do_sample=False) for row in ROWS[:2]]
        results: dict[int, list] = {0: [], 1: []}

        def work(index):
            for _ in range(5):
                results[index].append(model.generate(ROWS[index], max_new_tokens=4, do_sample=False))

        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index in (0, 1):
        assert len(results[index]) == 5
        assert all(torch.equal(result, expected[index]) for result in results[index])


def test_an_unpruned_model_runs_unobserved_beside_a_pruned_one():
    pruned, plain = tiny_model(seed=0), tiny_model(seed=1)
    expected = logits(plain)
    with prune(pruned, PLAN, adapter=TinyAdapter()):
        assert torch.equal(logits(plain), expected)


def test_what_others_put_in_the_same_place_is_left_there():
    own = vars(ALL_ATTENTION_FUNCTIONS)
    theirs = ALL_ATTENTION_FUNCTIONS.get_interface
    own["get_interface"] = theirs
    try:
        with prune(tiny_model(), PLAN, adapter=TinyAdapter()):
            assert own["get_interface"] is not theirs
        assert own["get_interface"] is theirs
        with prune(tiny_model(), PLAN, adapter=TinyAdapter()):
            own["get_interface"] = theirs
        assert own["get_interface"] is theirs
        with prune(tiny_model(), PLAN, adapter=TinyAdapter()):
            del own["get_interface"]
        assert "get_interface" not in own
    finally:
        own.pop("get_interface", None)
