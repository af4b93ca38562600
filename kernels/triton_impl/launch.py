"""What every launch needs: its device, block sizes, heads shared out to programs, tensors as the kernels want them."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

LANGUAGE_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.uint8: tl.uint8,
    torch.float8_e4m3fn: tl.uint8,  # read as bytes: not every GPU converts e4m3
}

# One instruction multiplies and adds: Triton 3.9 warns that 3.10 will not do so unasked.
OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, /, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its tensors, whichever is the current one: Triton launches on that, and looks at no tensor."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants, **OPTIONS)
    else:
        kernel[grid](*arguments, **constants, **OPTIONS)


def block(size: int, least: int = 1) -> int:
    """The power of two that holds ``size``, and is no smaller than ``least``."""
    return max(1 << max(size - 1, 0).bit_length(), least)


def heads_at_once(heads: int, most: int = 4) -> int:
    """How many heads one program takes: the largest divisor of ``heads`` that is no more than ``most``."""
    return next(count for count in range(min(most, heads), 0, -1) if heads % count == 0)


def in_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension dense; copied where it is not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def aligned(address: int, *strides: int, itemsize: int) -> bool:
    """Whether rows begin at multiples of 16 bytes, so that they can be read 16 bytes at a time."""
    return address % 16 == 0 and all(stride * itemsize % 16 == 0 for stride in strides)
