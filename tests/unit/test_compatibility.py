"""Tested ranges stand in pyproject.toml; what runs outside of them says so, once."""

import json
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

import compat
from fastav import compatibility
from fastav.compatibility import ReleaseRange, check, declared_range, release_of, require_tested
from fastav.errors import FastAVWarning, InstallationError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["transformers"]]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)


@pytest.mark.parametrize("package", ["av", "numpy", "timm", "torch", "torchvision", "transformers"])
def test_ranges_have_both_ends_and_hold_what_tests_run_on(package: str) -> None:
    tested = declared_range(package, DECLARED)
    assert tested.oldest is not None
    assert tested.beyond is not None
    assert tested.oldest <= release_of(PINS[package]) < tested.beyond


def test_a_release_within_is_let_pass() -> None:
    check("torch", "2.13.0+cpu", ["torch<2.14,>=2.11"])
    check("torch", "2.11", ["torch>=2.11.0"])
    check("torch", "99", ["torchvision<1", "torch"])


@pytest.mark.parametrize("found", ["2.14.0", "2.14.0.dev20261101", "3.0"])
def test_a_newer_release_warns_and_names_the_range(found: str) -> None:
    with pytest.warns(FastAVWarning, match=rf"torch {found} is newer .* \(torch>=2.11,<2.14\)"):
        check("torch", found, ["torch<2.14,>=2.11; extra == 'x'"])


def test_an_older_release_is_an_error_that_says_what_to_install() -> None:
    with pytest.raises(InstallationError, match=r"transformers 4\.57\.1 is older") as caught:
        check("transformers", "4.57.1", ["transformers<5.25,>=5.17"])
    assert caught.value.hint == "pip install 'transformers>=5.17,<5.25'"


def test_the_warning_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "requires", lambda _: ["rich<1"])
    compatibility._require_tested.cache_clear()
    with pytest.warns(FastAVWarning, match="rich"):
        require_tested("rich")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_tested("rich", "no-such-package")
    compatibility._require_tested.cache_clear()


def test_extras_and_markers_are_read() -> None:
    declared = ["av<20,>=17.1", 'timm<1.1,>=1.0; extra == "transformers"', "rich>=13"]
    assert declared_range("timm", declared) == ReleaseRange((1,), (1, 1))
    assert declared_range("rich", declared) == ReleaseRange((13,), None)
    assert str(declared_range("av", declared)) == ">=17.1,<20"


def test_checks_are_made_where_packages_are_imported_and_not_before() -> None:
    code = """
import sys, importlib.metadata as m
real = m.requires
m.requires = lambda name: ["numpy<1", "av<1", "torch<1", "transformers<1"] if name == "fastav" else real(name)
import warnings
seen = []
warnings.showwarning = lambda message, *a, **k: seen.append(str(message).split()[0])
warnings.simplefilter("always")
import fastav
assert not seen
fastav.Layout
assert seen == ["numpy"], seen
fastav.Clip
assert seen == ["numpy", "av"], seen
fastav.prune, fastav.Decoding
assert seen == ["numpy", "av", "torch", "transformers"], seen
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_installed_here_is_within() -> None:
    for package in ("av", "numpy", "torch", "transformers"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(package, version(package), DECLARED)


def test_make_compat_runs_both_ends_of_what_is_declared() -> None:
    ran = [release_of(name.partition("==")[2]) for name in compat.RUNS if name.startswith("transformers==")]
    tested = declared_range("transformers", DECLARED)
    assert tested.oldest is not None
    assert tested.beyond is not None
    assert min(ran) == tested.oldest
    assert (*max(ran)[:-1], max(ran)[-1] + 1) == tested.beyond
    assert release_of(PINS["transformers"]) in ran
    for package in ("av", "numpy"):
        tested = declared_range(package, DECLARED)
        asked = [getattr(combination, package) for combination in compat.media_versions.COMBINATIONS]
        assert tested.oldest == min(release_of(one.partition("==")[2]) for one in asked if "==" in one)[:2]


def test_results_of_other_runs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "KEPT", tmp_path / "compat.json")
    for name in ("transformers==5.17.0", "transformers==5.24.0", "transformers==5.17.0"):
        compat.record(name, {name: compat.counts_of("....\n7 passed, 2 skipped in 3.21s")}, {"commit": name})
    compat.record("media", {"python 3.11, av 17.1.0": {"passed": 1}}, {"commit": "c"})
    found = json.loads((tmp_path / "compat.json").read_text(encoding="utf-8"))
    assert found["transformers"].keys() == {"5.17.0", "5.24.0"}
    assert found["transformers"]["5.24.0"] == {"commit": "transformers==5.24.0", "passed": 7, "skipped": 2}
    assert found["media"] == {"python 3.11, av 17.1.0": {"commit": "c", "passed": 1}}
    assert compat.counts_of("Traceback") == {}
    assert compat.main(["transformers==1"]) == 2
