"""What a release holds, and what `pip install` of it would give.

`make dist-test`: the source distribution and the wheel that is built from it hold what they should and nothing else, an
index would take and show them, and the tests of the source distribution can be run. `make wheel-test` (`--install`)
installs the wheel into a fresh environment, too. Nothing but torch is pinned there: the newest release of every other
dependency that pip takes must work.
"""

import argparse
import email
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"  # as in constraints.txt
QUESTION, ANSWER = "how many beeps are there?", "three"
QUIET = ("--quiet", "--disable-pip-version-check")
LARGEST = {".whl": 8e6, ".gz": 20e6}  # bytes

RUN = """
import sys
from importlib.resources import files
import fastav
from fastav.cli import main
assert "site-packages" in fastav.__file__, fastav.__file__
sys.exit(main(["run", str(files("fastav") / "assets" / "clips" / "triangle.mp4"), sys.argv[1]]))
"""

IN_SDIST = (
    "benchmarks/gpu_vllm/__main__.py",
    "benchmarks/load/__main__.py",
    "tests/vllm/site/sitecustomize.py",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "constraints.txt",
    "hatch_metadata.py",
    "mkdocs.yml",
    "pyproject.toml",
    "docs/quickstart.md",
    "examples/demo.py",
    "notebooks/quickstart.ipynb",
    "src/fastav/py.typed",
    "tests/conftest.py",
    "training/__main__.py",
)
NOT_IN_SDIST = (".ci/", ".github/", ".venv/", ".vllm/", ".tools/", ".git/", "site/", "dist/", "build/")
IN_WHEEL = (
    "fastav/py.typed",
    "fastav/assets/tiny/model.safetensors",
    "fastav/assets/clips/triangle.mp4",
    "fastav/report/answer.html",
    "fastav/report/base.html",
    "fastav/report/drawing.html",
    "fastav/report/losses.html",
    "fastav/report/page.html",
    "fastav/report/viewer.css",
    "fastav/report/viewer.js",
)
TESTS = ("test_docs.py", "test_public.py", "test_compatibility.py", "test_installation.py")  # of the repository's files


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--tests-with", type=Path, help="the Python to run tests of the source distribution with")
    options.add_argument("--install", action="store_true", help="install the wheel into a fresh environment")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastav-wheel-") as folder:
        place = Path(folder)
        build("sdist", place, ROOT)
        (sdist,) = (place / "dist").glob("*.tar.gz")
        check_sdist(sdist)
        with tarfile.open(sdist) as archive:
            archive.extractall(place, filter="data")
        source = place / sdist.name.removesuffix(".tar.gz")
        build("wheel", place, source)
        (wheel,) = (place / "dist").glob("*.whl")
        check_wheel(wheel)
        for path in (sdist, wheel):
            if path.stat().st_size > LARGEST[path.suffix]:
                sys.exit(f"{path.name} is too large: {size(path)}")
            print(f"{path.name}: {size(path)}", flush=True)
        check_description(wheel)
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
        if chosen.tests_with:
            check_tests(source, chosen.tests_with)
        if chosen.install:
            check_installed(fresh(place / "fresh"), wheel, place)


def build(target: str, place: Path, source: Path) -> None:
    """With the tools of this environment, into the folder `dist`."""
    run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", place / "dist", cwd=source)


def check_sdist(path: Path) -> None:
    """It holds what is needed to build and test, but not the rows of results, which are large."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    require(names, IN_SDIST, path)
    refuse({name for name in names if name.startswith(NOT_IN_SDIST) or name.endswith(".jsonl")}, path)


def check_wheel(path: Path) -> None:
    """It holds the package with its assets, and nothing beside it."""
    names = set(zipfile.ZipFile(path).namelist())
    require(names, IN_WHEEL, path)
    refuse({name for name in names if name.split("/")[0] != "fastav" and ".dist-info/" not in name}, path)


def check_description(wheel: Path) -> None:
    """An index would show README.md, whose links do not depend on where it is shown."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    text = str(metadata.get_payload(decode=True), "utf-8")
    if not text.startswith("# fastav"):
        sys.exit(f"{wheel.name} describes itself as {text[:40]!r}")
    if relative := re.findall(r"\]\((?!\w+:|#)([^)]*)\)", text):
        sys.exit(f"{wheel.name} has relative links in its description: {', '.join(relative[:5])}")
    if len(metadata.get_all("Project-URL", [])) < 4:
        sys.exit(f"{wheel.name} does not say where the project lives")


def check_tests(source: Path, python: Path) -> None:
    """All tests of the source distribution can be collected, and those of the repository's files pass."""
    pytest = ("env", f"PYTHONPATH={source / 'src'}", python, "-m", "pytest", "-p", "no:cacheprovider", "-q")
    run(*pytest, "--collect-only", "-qq", "tests", cwd=source, quiet=True)
    run(*pytest, *(Path("tests") / "unit" / name for name in TESTS), cwd=source)


def check_installed(python: Path, wheel: Path, place: Path) -> None:
    """It installs without constraints, and answers a question about a clip that comes with it."""
    pip(python, "install", TORCH)
    pip(python, "install", wheel)
    run(python, "-m", "pip", "check")
    done = subprocess.run([python, "-I", "-c", RUN, QUESTION], cwd=place, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, flush=True)
    if done.returncode or done.stdout.strip() != ANSWER:
        sys.exit(f"the installed fastav said {done.stdout.strip()!r} (exit code {done.returncode}), not {ANSWER!r}")
    print("the installed wheel answers", flush=True)


def fresh(place: Path) -> Path:
    """The Python of a new environment."""
    venv.create(place, with_pip=True)
    return place / "bin" / "python"


def pip(python: Path, command: str, *arguments: object) -> None:
    run(python, "-m", "pip", command, *QUIET, *arguments)


def run(*arguments: object, cwd: Path | None = None, quiet: bool = False) -> None:
    """Run a command; quiet: what it prints is shown only if it fails."""
    done = subprocess.run([str(a) for a in arguments], cwd=cwd, capture_output=quiet, text=True, check=False)
    if done.returncode:
        shown = f"\n{done.stdout[-4000:]}{done.stderr[-2000:]}" if quiet else ""
        sys.exit(f"exit code {done.returncode}: {' '.join(map(str, arguments))}{shown}")


def require(names: set[str], wanted: tuple[str, ...], path: Path) -> None:
    if missing := [name for name in wanted if name not in names]:
        sys.exit(f"{path.name} lacks {', '.join(missing)}")


def refuse(unwanted: set[str], path: Path) -> None:
    if unwanted:
        sys.exit(f"{path.name} holds {', '.join(sorted(unwanted)[:5])}")


def size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
