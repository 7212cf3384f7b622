"""What is said of exceptions of other libraries, of packages that are missing, and of those that do not fit."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastav
from fastav.errors import CheckpointError, FastAVError, InstallationError, PlanError, reason_of
from fastav.installation import importable
from fastav.models._checkpoint import read_processor
from fastav.models._official import OfficialAdapter
from fastav.registry import MODELS, Registry

OFFICIAL = [name for name in MODELS if issubclass(MODELS[name], OfficialAdapter)]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such size"), "no such size"),
        (ImportError("\nQwen needs Torchvision: see\nthe page\n"), "Qwen needs Torchvision: see"),
        (RuntimeError("Error(s) in loading X:\n\tsize mismatch for a"), "Error(s) in loading X: size mismatch for a"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError(), "ValueError"),
        (OSError("\n \n"), "OSError"),
        (PlanError("a plan is wrong", "mend it"), "a plan is wrong"),
        (caused(ImportError("cannot import Y now"), RuntimeError("operator nms is missing")), None),
        (caused(ValueError("bad file: [Errno 2] gone for good"), OSError("[Errno 2] gone for good")), None),
        (ValueError("a" * 400 + " b"), "a" * 297 + "..."),
    ],
)
def test_a_reason_is_one_line_and_never_empty(error, line):
    if line is None:
        root = str(error.__cause__)
        line = str(error) if root in str(error) else f"{error} ({root})"
    assert reason_of(error) == line


def test_a_reason_may_name_its_type():
    assert reason_of(ValueError("no such size"), with_type=True) == "ValueError: no such size"
    assert reason_of(KeyError("x"), with_type=True) == "KeyError: 'x'"


def test_an_exception_without_words_has_those_that_it_was_raised_beside():
    error = ValueError()
    error.__context__ = OSError("disk is full")
    assert reason_of(error) == "ValueError (disk is full)"


def test_no_message_is_shortened_in_another_way():
    source = Path(__file__).parents[2] / "src" / "fastav"
    assert [path.name for path in source.rglob("*.py") if "splitlines()[0]" in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_missing_torchvision_is_named_before_anything_loads(name, monkeypatch):
    monkeypatch.setattr("fastav.installation.find_spec", lambda _: None)
    with pytest.raises(InstallationError, match=r"needs .*torchvision, which .* not installed") as error:
        MODELS[name]().load("there/is-nothing")
    assert error.value.hint == "in a checkout of fastav: pip install '.[transformers]'"


class Failing:
    error: Exception

    @classmethod
    def from_pretrained(cls, *_, **__):
        raise cls.error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ImportError("\nX requires the Y library\nbut"), InstallationError, "requires the Y library"),
        (Exception(), CheckpointError, "the tokenizer of there cannot be read: Exception"),
        (ValueError("\nno merges"), CheckpointError, "cannot be read: no merges"),
    ],
)
def test_a_processor_that_fails_says_why(error, kind, message):
    Failing.error = error
    with pytest.raises(kind, match=message):
        read_processor(Failing, "there", {})


BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')"
COMMAND = """
import sys
from fastav.cli import main
print(main(["flops"]), main(["models"]))
from fastav.bench.__main__ import main as bench
print(bench(["--tokens", "8"]))
import fastav
try:
    fastav.pipeline
except fastav.FastAVError as error:
    print(type(error).__name__)
try:
    from fastav.request import Request
except fastav.FastAVError as error:
    print(type(error).__name__)
"""


def test_a_torchvision_that_does_not_fit_torch_is_one_error_with_a_hint(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN)
    (tmp_path / "torchvision-9.9.dist-info").mkdir()
    (tmp_path / "torchvision-9.9.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 9.9\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {COMMAND}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "2 2\n2\nInstallationError\nInstallationError\n", done.stderr
    error, hint, *again = done.stderr.splitlines()
    assert error.startswith("error: torchvision 9.9 does not work with torch 2.")
    assert error.endswith(": operator torchvision::nms does not exist")
    assert "install torch and torchvision together" in hint
    assert again == [error, hint] * 2


def test_what_a_package_lacks_is_its_own_fault(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()  # what a package leaves behind that was not removed whole
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision" / "__init__.py").touch()
    for code in ("import torchvision.io", "from torchvision import io"):
        with pytest.raises(InstallationError, match=r"torchvision .*does not work with torch") as error, importable():
            exec(code, {"__name__": "transformers.image_utils"})
        assert "torchvision" in error.value.message.partition(": ")[2]
    with pytest.raises(ImportError, match="no_such"), importable():
        exec("import no_such", {"__name__": "transformers.image_utils"})


def test_a_missing_package_is_named_before_the_hub_is_asked(monkeypatch):
    monkeypatch.setattr("fastav.installation.find_spec", lambda _: None)
    monkeypatch.setattr("fastav.sources.get_hf_file_metadata", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InstallationError, match=r"qwen2-5-omni needs torchvision, which is not installed"):
        fastav.pipeline("qwen2-5-omni")


def test_a_package_of_another_that_is_broken_says_its_reason(monkeypatch):
    class Point:
        dist = None

        def load(self):
            raise KeyError("missing")

    registry = Registry("method", "fastav.methods")
    monkeypatch.setitem(registry.__dict__, "_plugins", {"theirs": Point()})
    with pytest.raises(FastAVError, match="cannot be loaded: KeyError: 'missing'"):
        registry["theirs"]
