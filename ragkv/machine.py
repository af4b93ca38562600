"""The machine that ragkv runs on."""

from __future__ import annotations

import platform


def processor() -> str:
    """What the CPU is called."""
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
