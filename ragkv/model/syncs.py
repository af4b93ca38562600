"""Operations at which the host waits for a device: what cannot be a part of a captured graph, nor of a step that runs ahead.

``torch.cuda.set_sync_debug_mode`` says the same, but for all threads of a process at once, and only with a GPU. Here one thread's
block is looked at, on any device, so that a CPU shows what a GPU would wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What PyTorch does by reading numbers, or the count of them, back to the host.
_READING = (
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "argwhere", "masked_select", "isin", "bincount"),
    *("unique_consecutive", "unique_dim", "unique_dim_consecutive", "_unique", "_unique2"),
    "transformers::grouped_mm_fallback",
)
# Methods that need not reach PyTorch's operations where a tensor lies on the CPU already.
_METHODS: Mapping[Callable[..., Any], str] = {
    method: method.__name__ for method in (Tensor.tolist, Tensor.cpu, Tensor.numpy)
}
# What makes tensors of the host's numbers, and copies them to where they are said to be, past PyTorch's operations.
_MAKING = (torch.tensor, torch.as_tensor)
_MASKS = (torch.bool, torch.uint8)


class HostSyncError(RuntimeError):
    """The host would wait for a device. Never leaves ragkv."""


def _refuse(name: str) -> None:
    raise HostSyncError(name)


@contextmanager
def no_syncs(device: torch.device, tell: Callable[[str], object] = _refuse) -> Iterator[None]:
    """A block of this thread in which nothing may wait for a device.

    Args:
        device: whose tensors count. On a CPU all of them do: they stand for those of a device, but for what is made with
            ``device="cpu"``, which is the host's own.
        tell: told by name of what would wait, before it does; by default raises.

    Raises:
        HostSyncError: something would wait, by name. What wrote in place before has done so.
    """
    with _Methods(device, tell), _Operations(device, tell):
        yield


class _Methods(TorchFunctionMode):
    def __init__(self, device: torch.device, tell: Callable[[str], object]):
        super().__init__()
        self._device, self._tell = device, tell

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _METHODS and args[0].device == self._device:
            self._tell(_METHODS[func])
        there = (kwargs or {}).get("device")
        if func in _MAKING and there not in (None, "cpu") and torch.device(there).type == self._device.type:
            self._tell(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, device: torch.device, tell: Callable[[str], object]):
        super().__init__()
        self._device, self._tell = device, tell

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if self._waits(name, args, kwargs or {}):
            self._tell(name)
        return func(*args, **(kwargs or {}))

    def _waits(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if name in _READING:
            return any(isinstance(value, Tensor) and value.device == self._device for value in args)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            return any(isinstance(index, Tensor) and index.dtype in _MASKS for index in args[1])
        if name == "_grouped_mm":  # of bf16 there is a kernel; else which rows are whose is read within the operation
            return self._device.type != "cpu" and args[0].dtype != torch.bfloat16
        if name == "repeat_interleave":  # how many there will be is what the repeats say
            return isinstance(args[min(1, len(args) - 1)], Tensor) and kwargs.get("output_size") is None
        if name == "_to_copy":
            return self._device.type != "cpu" and _leaves(args[0], kwargs.get("device"))
        if name == "copy_":
            return self._device.type != "cpu" and _leaves(args[1], args[0].device)
        return False


def _leaves(source: Tensor, device: torch.device | None) -> bool:
    """Whether a copy crosses between the host and a device, in either direction: a captured graph would do it from old memory."""
    return device is not None and (source.device.type == "cpu") != (torch.device(device).type == "cpu")
