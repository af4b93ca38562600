"""Bringing a prompt's layers to a device while it computes: in a stream of copies' own, which work waits for by event.

Copies in the stream that computes are done between its kernels: loading and computing take the sum of both, not the longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


class Bus:
    """One device's.

    Args:
        module: ``torch.cuda``, or another device's module of the same kind.
        device: to which things are brought.
        stream: of the copies.
    """

    def __init__(self, module: Any, device: torch.device, stream: Any):
        self._module, self._device, self._stream = module, device, stream

    def room(self, *size: int) -> Tensor:
        """uint8 for what is brought; the stream of copies alone may write to it."""
        with self._module.stream(self._stream):
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def send(self, load: Callable[[], Sequence[Tensor]], free: Any = None) -> Callable[[], None]:
        """Begin to bring something; returns what has the stream wait for it that is the current one by then.

        Args:
            load: copies it; returns the memory that it copies to, and waits for nothing that the device does. What it copies from
                must not be freed or changed before the device has come so far.
            free: of :meth:`mark`, behind which that memory may be written to.
        """
        with self._module.stream(self._stream):
            if free is not None:
                self._stream.wait_event(free)
            brought = load()
            there = self._stream.record_event()

        def arrived() -> None:
            stream = self._module.current_stream(self._device)
            stream.wait_event(there)
            for tensor in brought:
                self._used(tensor, stream)

        return arrived

    def mark(self) -> Any:
        """When the current stream has done what it was given."""
        return self._module.current_stream(self._device).record_event()

    def _used(self, tensor: Tensor, stream: Any) -> None:
        """Its memory is given to nobody else before a stream has done what it is given now."""
        tensor.record_stream(stream)


def bus(device: torch.device) -> Bus | None:
    """That of a device; ``None`` where nothing has to be brought, or nobody knows how."""
    return Bus(torch.get_device_module(device), device, _stream(device)) if device.type == "cuda" else None


@cache
def _stream(device: torch.device) -> Any:
    """One for all prompts: PyTorch keeps the memory of each stream apart."""
    return torch.get_device_module(device).Stream(device)
