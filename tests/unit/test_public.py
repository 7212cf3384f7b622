"""The public surface: complete, sorted, lazy, and helpful when wrong."""

import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pkgutil import resolve_name

import pytest

import fastav
from fastav import errors
from fastav.errors import FastAVError, UnknownName
from fastav.registry import ENGINES, METHODS, MODELS, RECIPES, TASKS, Registry
from support import pages


def test_all_is_sorted_and_every_name_is_there():
    assert fastav.__all__ == sorted(fastav.__all__)
    for name in fastav.__all__:
        assert getattr(fastav, name) is not None
        assert name in dir(fastav)


def test_a_name_that_is_not_there_raises():
    with pytest.raises(AttributeError, match="has no attribute 'fast'"):
        _ = fastav.fast


def test_importing_loads_nothing_heavy():
    code = "import fastav, sys; print({'torch', 'transformers', 'numpy', 'av'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_every_error_is_in_the_tree_and_drawn():
    for name, error in vars(errors).items():
        if isinstance(error, type):
            assert issubclass(error, FastAVError | errors.FastAVWarning)
            assert name in (errors.__doc__ or "")


def test_an_error_shows_its_hint():
    assert str(FastAVError("wrong", "do this")) == "wrong (do this)"
    assert str(FastAVError("wrong")) == "wrong"


def test_a_registry_is_a_mapping_by_file_name():
    assert {"given", "keep-first", "last-query", "position", "random", "unpadded"} <= set(METHODS)
    assert METHODS["last-query"].__name__ == "LastQuery"
    with pytest.raises(UnknownName, match="did you mean 'position'"):
        METHODS["postion"]
    assert "postion" not in METHODS


def test_other_packages_are_found_by_entry_point(monkeypatch):
    points = [
        EntryPoint("shout", "fastav.methods.position:Position", "fastav.methods"),
        EntryPoint("broken", "no_such_package:Method", "fastav.methods"),
        EntryPoint("position", "no_such_package:Method", "fastav.methods"),
    ]
    monkeypatch.setattr("fastav.registry.entry_points", lambda group: [p for p in points if p.group == group])
    methods = Registry("method", "fastav.methods")
    assert methods["shout"] is METHODS["position"] is methods["position"]
    assert list(methods)[-2:] == ["broken", "shout"]
    with pytest.raises(FastAVError, match=r"'broken' of another package cannot be loaded: ModuleNotFoundError"):
        methods["broken"]


def test_every_public_name_is_in_the_api_reference():
    documented = pages.identifiers()
    assert {f"fastav.{name}" for name in fastav.__all__} <= documented.keys()
    for name in documented:
        assert resolve_name(name) is not None, f"the API reference names {name}, which does not exist"
    listed = re.findall(r"\[`(\w+)`\]\[fastav\.\1\]", pages.text_of("docs/reference/index.md"))
    assert sorted(listed) == fastav.__all__


@pytest.mark.parametrize("page", [*pages.pages(), "examples/demo.py"])
def test_what_pages_use_is_public(page):
    text = re.sub(r"--(worker-cls|scheduler-cls|middleware) [\w.]+", "", pages.text_of(page))  # of vLLM's command
    used = {m[1] for m in re.finditer(r"(?<![\w./-])(?<!-m )(fastav(?:\.[A-Za-z_]\w*)+)", text)}
    for module, names in re.findall(r"^\s*from (fastav[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
        used |= {f"{module}.{name.strip()}" for name in names.split(",")}
    assert not {name for name in used if not is_public(name)}


def is_public(name):
    """Whether the API reference documents a name, something in it, or the whole of its module."""
    documented = pages.identifiers()
    parts = name.split(".")
    homes = [".".join(parts[:n]) for n in range(2, len(parts) + 1)]
    within = any(other.startswith(f"{name}.") for other in documented)
    return within or name in GROUPS | documented.keys() or any(documented.get(home) for home in homes)


GROUPS = {  # of entry points
    registry._package for registry in (METHODS, RECIPES, MODELS, ENGINES, TASKS)
}
