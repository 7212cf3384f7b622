"""What `pip install` of a release would give: a wheel, built from the source distribution, in a fresh environment.

Nothing but torch is pinned: the newest release of every other dependency that pip takes must work. Run by
`make wheel-test`.
"""

import email
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

RUN = """
import sys
from importlib.resources import files
import fastav
from fastav.cli import main
assert "site-packages" in fastav.__file__, fastav.__file__
sys.exit(main(["run", str(files("fastav") / "assets" / "clips" / "triangle.mp4"), sys.argv[1]]))
"""

IN_SDIST = (
    "benchmarks/load/__main__.py",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "constraints.txt",
    "pyproject.toml",
    "src/fastav/py.typed",
)
IN_WHEEL = (
    "fastav/py.typed",
    "fastav/assets/tiny/model.safetensors",
    "fastav/assets/clips/triangle.mp4",
    "fastav/report/page.html",
)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fastav-wheel-") as folder:
        place = Path(folder)
        python = fresh(place / "tools")
        pip(python, "install", "hatchling", "readme-renderer[md]")
        run(python, "-m", "hatchling", "build", "--target", "sdist", "--directory", place / "dist", cwd=ROOT)
        (sdist,) = (place / "dist").glob("*.tar.gz")
        check_sdist(sdist)
        pip(python, "wheel", "--no-deps", "--wheel-dir", place / "dist", sdist)
        (wheel,) = (place / "dist").glob("*.whl")
        check_wheel(wheel)
        print(f"{sdist.name}: {size(sdist)}; {wheel.name}: {size(wheel)}", flush=True)
        (place / "README.md").write_text(description(wheel), encoding="utf-8")
        run(python, "-m", "readme_renderer", place / "README.md", "--format", "md", "--output", place / "README.html")
        check_installed(fresh(place / "fresh"), wheel, place)


def check_sdist(path: Path) -> None:
    """It holds what is needed to build and test, and no results."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    require(names, IN_SDIST, path)
    refuse(names, ("results/", ".ci/", ".venv/", ".vllm/"), path)


def check_wheel(path: Path) -> None:
    """It holds the package with its assets, and nothing beside it."""
    names = set(zipfile.ZipFile(path).namelist())
    require(names, IN_WHEEL, path)
    if beside := sorted(name for name in names if name.split("/")[0] != "fastav" and ".dist-info/" not in name):
        sys.exit(f"{path.name} holds {', '.join(beside[:5])}")


def description(wheel: Path) -> str:
    """What an index would show: README.md, as the wheel holds it."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = str(email.message_from_bytes(archive.read(name)).get_payload(decode=True), "utf-8")
    if not text.startswith("# fastav"):
        sys.exit(f"{wheel.name} describes itself as {text[:40]!r}")
    return text


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


def run(*arguments: object, cwd: Path | None = None) -> None:
    if code := subprocess.run([str(a) for a in arguments], cwd=cwd, check=False).returncode:
        sys.exit(f"exit code {code}: {' '.join(map(str, arguments))}")


def require(names: set[str], wanted: tuple[str, ...], path: Path) -> None:
    if missing := [name for name in wanted if name not in names]:
        sys.exit(f"{path.name} lacks {', '.join(missing)}")


def refuse(names: set[str], starts: tuple[str, ...], path: Path) -> None:
    if found := sorted(name for name in names if name.startswith(starts)):
        sys.exit(f"{path.name} holds {', '.join(found[:5])}")


def size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
