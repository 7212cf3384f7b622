"""`fastav.prune` as a handle: applied and removed, or a context; one that is never used says so."""

import gc
import subprocess
import sys
import warnings

import pytest
import torch

import fastav
from fastav.engines.transformers import prune
from fastav.errors import UnknownName, UnsupportedPlan
from integration.test_no_trace import logits, state_of
from support.cases import PLAN
from support.tiny import TinyAdapter, tiny_model


def test_applied_until_removed():
    model = tiny_model()
    before, plain = state_of(model), logits(model)
    with prune(model, PLAN, adapter=TinyAdapter()) as pruning:
        inside, kept = logits(model), pruning.tokens()
    handle = prune(model, PLAN, adapter=TinyAdapter())
    assert state_of(model) == before
    assert handle.apply() is handle
    assert torch.equal(logits(model), inside)
    assert handle.tokens() == kept
    handle.remove()
    assert state_of(model) == before
    assert torch.equal(logits(model), plain)
    handle.remove()
    assert state_of(model) == before
    handle.apply()
    assert torch.equal(logits(model), inside)
    handle.remove()
    assert state_of(model) == before


def test_what_is_applied_already_is_not_applied_again():
    model = tiny_model()
    before, handle = state_of(model), prune(model, PLAN, adapter=TinyAdapter()).apply()
    with pytest.raises(UnsupportedPlan, match="applied already"):
        handle.apply()
    with pytest.raises(UnsupportedPlan, match="pruned already"), prune(model, PLAN, adapter=TinyAdapter()):
        pass
    handle.remove()
    assert state_of(model) == before


def test_it_is_checked_at_once():
    with pytest.raises(UnknownName):
        prune(tiny_model(), "fastaw", adapter=TinyAdapter())


def test_one_that_is_never_used_warns_where_it_was_made():
    with pytest.warns(UserWarning, match="nothing was pruned") as seen:
        fastav.prune(tiny_model(), PLAN, adapter=TinyAdapter())
    assert seen[0].filename == __file__


def test_one_that_was_used_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny_model()
        prune(model, PLAN, adapter=TinyAdapter()).apply().remove()
        with prune(model, PLAN, adapter=TinyAdapter()):
            pass
        gc.collect()


def test_one_that_is_held_until_python_ends_warns_then():
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import fastav\nfrom support.cases import PLAN\nfrom support.tiny import TinyAdapter, tiny_model\n"
        "handle = fastav.prune(tiny_model(), PLAN, adapter=TinyAdapter())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert done.stderr.count("nothing was pruned") == 1
    assert "Traceback" not in done.stderr
