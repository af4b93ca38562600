"""Which implementation of an operation runs. Nothing here loads triton before it is asked for."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from ragkv.errors import MissingPackageError, RagKVError

#: ``"auto"`` takes triton on a CUDA device that it supports, else the reference; the others run or raise.
Impl = Literal["auto", "reference", "triton"]
Ran = Literal["reference", "triton"]

#: What the Triton versions compute with.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST_CAPABILITY = (8, 0)  # Ampere: bf16 in the matrix units


class KernelError(RagKVError, ValueError):
    """An operation was given tensors that do not fit together, or an implementation that cannot run them."""


def implementation(impl: Impl, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Ran:
    """The implementation that ``impl`` stands for on a device: what a report should name.

    Args:
        impl: what was asked for.
        device: where the tensors are.
        dtype: of what is computed.

    Raises:
        KernelError: there is no such implementation, or triton was asked for by name and cannot run there.
        MissingPackageError: triton was asked for by name and is not installed.
    """
    if impl not in get_args(Impl):
        raise KernelError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl == "reference":
        return "reference"
    obstacle = _obstacle(torch.device(device), dtype)
    if obstacle is None:
        return "triton"
    if impl == "triton":
        raise obstacle
    return "reference"


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _obstacle(device: torch.device, dtype: torch.dtype) -> RagKVError | None:
    """Why triton cannot run there, if it cannot."""
    if not _installed():
        return MissingPackageError(
            "impl='triton' needs triton. Install it with: pip install 'ragkv[triton]', or use impl='reference'"
        )
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        return KernelError(f"impl='triton' computes {names}, got {dtype}: use impl='reference'")
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return KernelError(f"impl='triton' needs tensors on a CUDA device, got {device}: use impl='reference'")
    capability = _capability(device)
    if capability < _OLDEST_CAPABILITY:
        return KernelError(
            f"impl='triton' needs a GPU of compute capability 8.0 or later, {device} has "
            f"{'.'.join(map(str, capability))}: use impl='reference'"
        )
    return None


@cache
def _installed() -> bool:
    try:
        return find_spec("triton") is not None
    except ValueError:  # a module that somebody put into sys.modules without a spec
        return False


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
