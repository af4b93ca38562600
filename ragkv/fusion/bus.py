"""Bringing a prompt's layers to a device while it computes: in a stream of copies' own, which work waits for by event.

Copies in the stream that computes are done between its kernels: loading and computing take the sum of both, not the longer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ragkv.kernels import Stored

#: K and V as their tier holds them, on the device, by number.
Load = Mapping[int, Sequence[Stored]]


class Bus:
    """One device's.

    Args:
        module: ``torch.cuda``, or another device's module of the same kind.
        device: to which things are brought.
        stream: of the copies.
    """

    def __init__(self, module: Any, device: torch.device, stream: Any):
        self._module, self._device, self._stream = module, device, stream

    def send(self, load: Callable[[], Load]) -> Callable[[], Load]:
        """Begin to bring something; returns what gives it to the stream that is the current one by then.

        Args:
            load: copies it, into memory of its own, and waits for nothing that the device does. What it copies from must not be
                freed or changed before the device has come so far.
        """
        with self._module.stream(self._stream):
            brought = load()
            there = self._stream.record_event()

        def arrived() -> Load:
            stream = self._module.current_stream(self._device)
            stream.wait_event(there)
            for stored in (one for pair in brought.values() for one in pair):
                for part in (stored.numbers, stored.scale, stored.low):
                    if part is not None:
                        self._used(part, stream)
            return brought

        return arrived

    def _used(self, part: Tensor, stream: Any) -> None:
        """Its memory is given to nobody else before a stream has done what it is given now."""
        part.record_stream(stream)


def bus(device: torch.device) -> Bus | None:
    """That of a device; ``None`` where nothing has to be brought, or nobody knows how."""
    return Bus(torch.get_device_module(device), device, _stream(device)) if device.type == "cuda" else None


@cache
def _stream(device: torch.device) -> Any:
    """One for all prompts: PyTorch keeps the memory of each stream apart."""
    return torch.get_device_module(device).Stream(device)
