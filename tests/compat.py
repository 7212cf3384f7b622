"""Run the tests against the oldest and the newest supported transformers: `make compat`.

Each version is installed into `.compat/` beside the environment and put first on the path; what passed, with commit and
date, goes to `results/compat.json`. Takes some minutes a version; `python tests/compat.py 5.23.0` runs that one alone.
"""

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
# with what a version needs and the constraints do not have
VERSIONS: dict[str, list[str]] = {"5.17.0": ["huggingface_hub<2"], "5.23.0": []}


def run(version: str, extras: list[str]) -> dict[str, int]:
    """Install one version and run the tests; how many passed, failed, and so on."""
    target = ROOT / ".compat" / version
    if not target.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target)]
        subprocess.run([*pip, "--no-deps", f"transformers=={version}"], check=True)  # torch stays the one that is here
        if extras:
            subprocess.run([*pip, *extras], check=True)
    path = f"{target}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    tests = [sys.executable, "-m", "pytest", "-m", "not slow and not gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(tests, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-3000:])
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout.splitlines()[-1])
    return {kind: int(count) for count, kind in counts}


def commit() -> str:
    """What is tested."""
    git = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main(versions: list[str]) -> int:
    """Run these versions, or all; 0 if all tests passed."""
    kept = ROOT / "results" / "compat.json"
    result = json.loads(kept.read_text(encoding="utf-8")) | {"python": sys.version.split()[0]}
    failed = False
    for version in versions or VERSIONS:
        circumstances = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        counts = run(version, VERSIONS[version])
        failed = failed or bool(set(counts) & {"failed", "error", "errors"})
        result["transformers"][version] = circumstances | counts
        kept.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
