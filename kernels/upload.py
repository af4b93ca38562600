"""Small tensors to a device, without waiting for it.

``tensor.to(device)`` waits until the device has done all that it was given before. Out of pinned memory nothing waits, and torch
keeps that memory until it was read.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, in the order of its current stream; the tensor itself where that is the CPU."""
    if device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def beside(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for int64 ``[size]`` on the CPU, to be filled, and on a device, whose address is known by then; one on the CPU."""
    host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return host, host if device.type == "cpu" else torch.empty(size, dtype=torch.int64, device=device)


def arrive(host: Tensor, there: Tensor) -> None:
    """Have on the device what stands on the CPU (:func:`beside`)."""
    if there is not host:
        there.copy_(host, non_blocking=True)
