"""Where a model runs, and in what type."""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastav.errors import FastAVError, InstallationError, reason_of
from fastav.installation import is_installed
from fastav.registry import unknown_name

DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"  # the type that the checkpoint has
KERNELS = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}  # where they come from


def placed(device: str | None, dtype: str | None, *, auto: bool = False) -> tuple[torch.device, str]:
    """Where and in what type a model runs that is asked for so, defaults filled in.

    auto: whether the type may be `auto`, the checkpoint's own.
    Raises: FastAVError.
    """
    place = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return place, known_dtype(dtype, auto=auto) or ("bfloat16" if place.type == "cuda" else "float32")


def known_dtype(dtype: str | None, *, auto: bool = False) -> str | None:
    """A type that weights may have, or None for the default.  Raises: FastAVError."""
    known = (*DTYPES, AUTO) if auto else DTYPES
    if dtype not in (None, *known):
        raise FastAVError(f"dtype must be {', '.join(known)}, got {dtype!r}")
    return dtype


def known_attention(attention: str) -> str:
    """An implementation of attention that transformers can run here.

    Raises: UnknownName; InstallationError for kernels that are not installed.
    """
    if attention not in (known := ("eager", *ALL_ATTENTION_FUNCTIONS)) and "/" not in attention:  # a hub id of kernels
        raise unknown_name("attention", attention, known)
    if (package := KERNELS.get(attention)) and not (is_installed(package) or is_installed("kernels")):
        raise InstallationError(
            f"attention {attention!r} needs the package {package}, which is not installed",
            "install it for a CUDA GPU by its own instructions, or take attention='sdpa'",
        )
    return attention


def _device(name: str) -> torch.device:
    """A device that is there.  Raises: FastAVError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise FastAVError(f"device {name!r} cannot be used: {reason_of(error)}", "use cpu") from None
    return device
