"""Run the tests that rounding might decide as other CPUs would: `make parity-cpus`.

What MKL, ATen and oneDNN compute depends on the CPU. Each takes older paths when told to by a variable; MKL's own paths
for Intel are taken elsewhere too once three of its questions are answered so by a small library loaded before it (where
there is a C compiler). What passed, with machine, versions, commit and date, goes to `results/cpus.json`.

`python tests/cpus.py Intel -- tests/unit/test_formulas.py` runs one setting, or other tests.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy
import torch
import transformers

from compat import commit
from media_versions import PYTEST

ROOT = Path(__file__).parents[1]
TESTS = ["tests/parity", "tests/unit/test_spectra.py", "tests/contract/test_traces.py"]
ANSWERS = {"mkl_serv_intel_cpu_true": 1, "mkl_serv_intel_cpu": 1, "mkl_serv_cpuiszen": 0}
OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "compatible": {"MKL_CBWR": "COMPATIBLE"},
    "compatible, no AVX": {"MKL_CBWR": "COMPATIBLE", **OLD},
    "AVX2": {"MKL_CBWR": "AVX2", **AVX2},
    "Intel": {"LD_PRELOAD": "intel"},
    "Intel, AVX2": {"LD_PRELOAD": "intel", "MKL_CBWR": "AVX2", **AVX2},
    "Intel, SSE4.2, no AVX": {"LD_PRELOAD": "intel", "MKL_CBWR": "SSE4_2", **OLD},
    "Intel, two threads": {"LD_PRELOAD": "intel", "OMP_NUM_THREADS": "2"},
}


def intel(folder: Path) -> Path | None:
    """A library that has MKL take its paths for Intel; None without a C compiler."""
    if shutil.which("cc") is None:
        return None
    source, library = folder / "intel.c", folder / "intel.so"
    answers = [f"int {question}(void) {{ return {answer}; }}\n" for question, answer in ANSWERS.items()]
    source.write_text("".join(answers), encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def run(settings: dict[str, str], tests: list[str]) -> dict[str, int]:
    """How many tests passed, failed, and so on."""
    variables = {"OMP_NUM_THREADS": "1", **settings}
    command = [sys.executable, *PYTEST, "-rf", *tests]
    done = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-2000:], done.stderr[-2000:], flush=True)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout.splitlines()[-1])
    return {kind: int(count) for count, kind in counts}


def about() -> dict[str, str]:
    """The machine, the versions, and which commit is tested when."""
    named = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "cpu": named.group(1) if named else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main(arguments: list[str]) -> int:
    """Run these settings, or all; 0 if all tests passed."""
    names, tests, kept = arguments or list(SETTINGS), TESTS, ROOT / "results" / "cpus.json"
    if "--" in arguments:
        names, tests = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    result = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    circumstances, failed = about(), False  # before the result is written, which makes the checkout differ
    with tempfile.TemporaryDirectory() as folder:
        library = intel(Path(folder))
        for name in names:
            settings = dict(SETTINGS[name])
            if "LD_PRELOAD" in settings and library is None:
                print(f"{name}: not run, there is no C compiler")
                continue
            print(name, settings, flush=True)
            counts = run(settings | ({"LD_PRELOAD": str(library)} if "LD_PRELOAD" in settings else {}), tests)
            failed = failed or set(counts) - {"passed", "skipped"} != set() or not counts
            result[name] = {"variables": settings, "tests": tests} | circumstances | counts
            if tests == TESTS:
                kept.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
