"""How much memory is free."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import torch

_CGROUP, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# How long an answer stands: asking a driver, or the system's files, takes up to a millisecond.
_KEPT_S = 0.005


class Free:
    """:func:`free_bytes`, as it was some milliseconds ago at most."""

    def __init__(self) -> None:
        self._found = dict[torch.device, tuple[float, int | None]]()

    def bytes(self, device: torch.device) -> int | None:
        """See :func:`free_bytes`."""
        now = perf_counter()
        found = self._found.get(device)
        if found is None or now - found[0] > _KEPT_S:
            found = self._found[device] = now, free_bytes(device)
        return found[1]

    def forget(self) -> None:
        """Look anew: something was given back."""
        self._found = {}


def free_bytes(device: torch.device) -> int | None:
    """What a device has left for tensors; ``None`` where that is not known.

    Of a GPU also what PyTorch has reserved and does not use; of the CPU what the system gives without swapping, and the limits
    of its control groups.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + unused_bytes(device)
    if device.type != "cpu":
        return None
    found = list[int]()
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    for group in _groups():
        with suppress(OSError, ValueError):  # "max" where there is no limit
            limit = int((group / "memory.max").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            found.append(limit - int((group / "memory.current").read_text()) + int(stat.get("inactive_file", "0")))
    return min(found, default=None)


def unused_bytes(device: torch.device) -> int:
    """What PyTorch has reserved of a GPU and does not use, in one look: each of its two functions flattens all statistics."""
    counted = torch.cuda.memory_stats_as_nested_dict(device)
    reserved, allocated = (counted[f"{name}_bytes"]["all"]["current"] for name in ("reserved", "allocated"))
    return int(reserved - allocated)


def _groups() -> list[Path]:
    """The process's control group and all that hold it (cgroup v2)."""
    with suppress(OSError, StopIteration):
        lines = os.fsdecode(_OWN.read_bytes()).split("\n")  # a name need not be Unicode
        own = _CGROUP / next(line for line in lines if line.startswith("0::")).removeprefix("0::").lstrip("/")
        return [group for group in (own, *own.parents) if group.is_relative_to(_CGROUP)]
    return [_CGROUP]
