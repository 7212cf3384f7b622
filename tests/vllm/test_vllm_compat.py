"""The installed vLLM has the names that fastav takes from it, in the modules that the table of its version gives."""

import os
import subprocess
import sys

import pytest

from fastav.engines.vllm import compat

NAMES = compat.INTERNALS[compat.version()]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_where_the_table_says(name):
    assert getattr(compat, name) is not None


def test_the_version_is_the_one_that_these_tests_are_for():
    assert compat.version() == os.environ.get("FASTAV_VLLM", compat.INSTALLED)


def test_every_version_has_all_names():
    assert all(table.keys() == NAMES.keys() for table in compat.INTERNALS.values())


def test_a_name_that_vllm_lacks_is_an_import_error(monkeypatch):
    monkeypatch.delitem(vars(compat), "LLM", raising=False)
    monkeypatch.setitem(compat.INTERNALS[compat.version()], "LLM", "vllm.logger")
    with pytest.raises(ImportError, match="LLM"):
        _ = compat.LLM
    with pytest.raises(AttributeError, match="no attribute 'llm'"):
        _ = compat.llm


def test_a_name_is_imported_once(monkeypatch):
    logger = compat.init_logger
    monkeypatch.setattr(compat, "_imported", lambda name: pytest.fail(f"imported {name} again"))
    assert compat.init_logger is logger


def test_importing_compat_does_not_import_vllm():
    code = "import sys; from fastav.engines.vllm import compat; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
