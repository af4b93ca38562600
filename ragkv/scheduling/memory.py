"""How much memory is free."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """What a device has left for tensors; ``None`` where that is not known.

    Of a GPU also what PyTorch has reserved and does not use; of the CPU what the system gives without swapping, and the control
    group's limit where there is one.
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
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int((_CGROUP / "memory.max").read_text())
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines()).get(
            "inactive_file", "0"
        )
        found.append(limit - int((_CGROUP / "memory.current").read_text()) + int(cached))
    return min(found, default=None)
