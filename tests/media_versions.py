"""Run the tests of media, which need no torch, with the oldest and newest PyAV and numpy of every Python.

`python tests/media_versions.py` runs all of `COMBINATIONS`, `python tests/media_versions.py 3.12` those of one Python.
From Python: `media_versions.run_all() -> {"python 3.12.1, av 19.0.2, numpy 2.5.5": {"passed": 812, ...}, ...}`; a
combination is good if its counts have neither `failed` nor `errors`. Environments lie in `.compat/media-*` beside the
environment and are made once; the interpreters are `python3.11`, ... on the path or pyenv's.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PYTEST = ("-m", "pytest", "-m", "not slow and not gpu and not browser", "-p", "no:cacheprovider")
TESTS = sorted((ROOT / "tests" / "unit").glob("test_media_*.py"))
TOOLS = ("pillow", "jaxtyping", "beartype", "pytest", "pytest-timeout", "hypothesis")


class Combination(NamedTuple):
    """A Python and what pip is told to install for it."""

    python: str
    av: str
    numpy: str

    @property
    def folder(self) -> Path:
        """Where its environment lies."""
        asked = re.sub(r"<", "below", f"{self.av}-{self.numpy}").replace("==", "")
        return ROOT / ".compat" / f"media-python{self.python}-{asked}"


COMBINATIONS = (
    Combination("3.11", "av==17.1.0", "numpy==1.26.4"),
    Combination("3.11", "av<19", "numpy<2.5"),  # newer ones of both need Python 3.12
    Combination("3.12", "av==17.1.0", "numpy==1.26.4"),
    Combination("3.12", "av<20", "numpy<3"),
    Combination("3.13", "av==17.1.0", "numpy==2.1.0"),
    Combination("3.13", "av<20", "numpy<3"),
)


def run_all(pythons: tuple[str, ...] = ()) -> dict[str, dict[str, int]]:
    """Test every combination, or those of some Pythons; how many tests passed, failed, and so on, by its versions."""
    return dict(run(one) for one in COMBINATIONS if not pythons or one.python in pythons)


def run(combination: Combination) -> tuple[str, dict[str, int]]:
    """Make the environment of one combination, if it is not there, and run the tests in it.

    Raises: SystemExit if there is no such Python; CalledProcessError if pip fails or the tests cannot be started.
    """
    python = _environment(combination)
    tests = [str(python), *PYTEST, *map(str, TESTS)]
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(tests, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.splitlines() or [""])[-1]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    name = _versions(python)
    print(f"{name}: {last}", flush=True)
    if done.returncode or not counts:
        print(done.stdout[-6000:], done.stderr[-3000:], flush=True)
    if not counts:
        raise subprocess.CalledProcessError(done.returncode, tests)
    return name, counts


def _environment(combination: Combination) -> Path:
    python = combination.folder / "bin" / "python"
    if not (combination.folder / ".ready").exists():
        shutil.rmtree(combination.folder, ignore_errors=True)
        subprocess.run([_interpreter(combination.python), "-m", "venv", str(combination.folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, combination.av, combination.numpy, *TOOLS], check=True)
        (combination.folder / ".ready").touch()
    return python


def _interpreter(version: str) -> str:
    """Raises: SystemExit if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for python in filter(None, found):
        said = subprocess.run([python, "-V"], capture_output=True, text=True)  # a shim of pyenv may lead nowhere
        if said.stdout.startswith(f"Python {version}."):
            return python
    raise SystemExit(f"there is no Python {version}: install it, or name others (3.11, 3.12, 3.13)")


def _versions(python: Path) -> str:
    code = "import av, numpy, platform; print('python', platform.python_version(), av.__version__, numpy.__version__)"
    said = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return "{} {}, av {}, numpy {}".format(*said)


def main(pythons: list[str]) -> int:
    """Run the combinations; 0 if all tests passed."""
    results = run_all(tuple(pythons))
    return int(any({"failed", "error", "errors"} & set(counts) for counts in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
