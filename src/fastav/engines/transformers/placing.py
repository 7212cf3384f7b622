"""Where a model runs, and in what type."""

import torch

from fastav.errors import FastAVError, reason_of

DTYPES = ("float32", "bfloat16", "float16")


def placed(device: str | None, dtype: str | None) -> tuple[torch.device, str]:
    """Where and in what type a model runs that is asked for so, defaults filled in.  Raises: FastAVError."""
    place = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return place, known_dtype(dtype) or ("bfloat16" if place.type == "cuda" else "float32")


def known_dtype(dtype: str | None) -> str | None:
    """A type that weights may have, or None for the default.  Raises: FastAVError."""
    if dtype not in (None, *DTYPES):
        raise FastAVError(f"dtype must be {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def _device(name: str) -> torch.device:
    """A device that is there.  Raises: FastAVError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise FastAVError(f"device {name!r} cannot be used: {reason_of(error)}", "use cpu") from None
    return device
