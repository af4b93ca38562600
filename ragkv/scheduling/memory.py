"""How much memory is free."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

_CGROUP, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """What a device has left for tensors; ``None`` where that is not known.

    Of a GPU also what PyTorch has reserved and does not use; of the CPU what the system gives without swapping, and the limits
    of its control groups.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
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


def _groups() -> list[Path]:
    """The process's control group and all that hold it (cgroup v2)."""
    with suppress(OSError, StopIteration):
        lines = _OWN.read_text().splitlines()
        own = _CGROUP / next(line for line in lines if line.startswith("0::")).removeprefix("0::").lstrip("/")
        return [group for group in (own, *own.parents) if group.is_relative_to(_CGROUP)]
    return [_CGROUP]
