"""Run the tests with the oldest, the pinned and the newest releases that fastav supports: `make compat`.

`python tests/compat.py` runs all of `RUNS`; `python tests/compat.py transformers==5.24.0 media` runs those alone. Each
release is installed into `.compat/` beside the environment, once, and put first on the path; `media` is
`media_versions.py`, with PyAV and numpy on several Pythons. What passed, with commit and date, goes to
`results/compat.json` after every run; the results of other runs stay there.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import media_versions

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "results" / "compat.json"
MEDIA = "media"


class Run(NamedTuple):
    """Tests, and what a release needs that the constraints do not have."""

    extras: tuple[str, ...] = ()
    tests: str = "tests"


RUNS = {
    "transformers==5.17.0": Run(("huggingface_hub<2",)),
    "transformers==5.19.0": Run(),
    "transformers==5.24.0": Run(),
    "numpy==1.26.4": Run(("pyarrow<21",), "tests/unit"),  # later ones want numpy 2
    MEDIA: Run(),
}


def run(release: str) -> dict[str, int]:
    """Install one release and run its tests; how many passed, failed, and so on."""
    target = ROOT / ".compat" / release
    if not (target / ".ready").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
        pip += ["--target", str(target)]
        subprocess.run([*pip, "--no-deps", release], check=True)  # torch stays the one that is here
        if extras := RUNS[release].extras:
            subprocess.run([*pip, *extras], check=True)
        (target / ".ready").touch()
    spread = ["-n", "2", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    tests = [sys.executable, *media_versions.PYTEST, *spread]
    path = f"{target}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [*tests, RUNS[release].tests]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    counts = counts_of(done.stdout)
    print(done.stdout[-3000:] if counts else done.stdout + done.stderr, flush=True)
    return counts or {"errors": 1}


def counts_of(output: str) -> dict[str, int]:
    """What pytest's last line says."""
    last = (output.splitlines() or [""])[-1]
    return {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}


def commit() -> str:
    """What is tested; results are not part of it."""
    git = {"cwd": ROOT, "capture_output": True, "text": True}
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "--", ".", ":!results"], **git).stdout.strip()
    return f"{revision}-dirty" if changed else revision


def record(name: str, found: dict[str, dict[str, int]], circumstances: dict[str, str | int]) -> None:
    """Write what was found, by releases, into the results, beside what other runs found."""
    result = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    package, _, version = name.partition("==")
    known = {one.partition("==")[2] for one in RUNS if one.startswith(f"{package}==")}
    before = {key: value for key, value in result.get(package, {}).items() if key in known}
    of_package = before | {version or versions: circumstances | counts for versions, counts in found.items()}
    kept = {key: value for key, value in result.items() if key in {one.partition("==")[0] for one in RUNS}}
    result = {"command": "make compat", "python": sys.version.split()[0]} | kept | {package: of_package}
    KEPT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main(names: list[str]) -> int:
    """Run these, or all; 0 if all tests passed, 2 for a name that is none."""
    if unknown := set(names) - set(RUNS):
        print(f"no run is called {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
        return 2
    failed = False
    for name in names or RUNS:
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        circumstances = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        found = media_versions.run_all() if name == MEDIA else {name: run(name)}
        record(name, found, circumstances | {"seconds": round(time.monotonic() - start)})
        failed = failed or any({"failed", "error", "errors"} & set(counts) for counts in found.values())
    print(KEPT.read_text(encoding="utf-8"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
