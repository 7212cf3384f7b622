"""The device that a model runs on, the type of its weights, and its attention implementation."""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastav.errors import FastAVError, InstallationError, reason_of
from fastav.installation import is_installed
from fastav.registry import unknown_name

DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"  # the checkpoint's own type
KERNELS = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}  # packages of kernels


def resolve_device(device: str | None, dtype: str | None, *, auto: bool = False) -> tuple[torch.device, str]:
    """The device and dtype for a model; None stands for a default.

    auto: whether the dtype may be `auto`, the checkpoint's own.
    Raises: FastAVError.
    """
    target = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return target, validate_dtype(dtype, auto=auto) or ("bfloat16" if target.type == "cuda" else "float32")


def validate_dtype(dtype: str | None, *, auto: bool = False) -> str | None:
    """The dtype, checked; None stands for the default.  Raises: FastAVError."""
    known = (*DTYPES, AUTO) if auto else DTYPES
    if dtype not in (None, *known):
        raise FastAVError(f"dtype must be {', '.join(known)}, got {dtype!r}")
    return dtype


def validate_attention(attention: str) -> str:
    """The attention implementation, checked: transformers must be able to run it here.

    Raises: UnknownName; InstallationError for kernels that are not installed.
    """
    if attention not in (known := ("eager", *ALL_ATTENTION_FUNCTIONS)) and "/" not in attention:  # a hub id of kernels
        raise unknown_name("attention", attention, known)
    if (package := KERNELS.get(attention)) and not (is_installed(package) or is_installed("kernels")):
        raise InstallationError(
            f"attention {attention!r} needs the package {package}, which is not installed",
            "install it for your CUDA GPU by its own instructions, or use attention='sdpa'",
        )
    return attention


def _device(name: str) -> torch.device:
    """The device, checked by an allocation.  Raises: FastAVError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise FastAVError(f"device {name!r} cannot be used: {reason_of(error)}", "use cpu") from None
    return device
