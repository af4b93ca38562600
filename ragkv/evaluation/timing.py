"""What a prompt costs when nothing is in memory: cold, from disk, and the most memory that it takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch

from ragkv.evaluation.arms import Arm
from ragkv.evaluation.bench import REFUSALS, Bench, CaseChunks
from ragkv.evaluation.cases import Case
from ragkv.evaluation.rows import Row
from ragkv.library.measured import Measured
from ragkv.store import TieredStore


class Clock:
    """Times arms on the same model with nothing in memory. Use as a context manager: it keeps KV on disk in a temporary folder.

    Args:
        bench: the model.
    """

    def __init__(self, bench: Bench):
        self._memory = bench
        self._folder = tempfile.TemporaryDirectory(prefix="ragkv-eval-")
        self._disk = bench.like(store=TieredStore(Path(self._folder.name), cpu_bytes=0, policy="lru"))
        # Without measuring what an arm does not need: that would be charged to it.
        self._cold = bench.like(measured=Measured.NOTHING)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._disk.engine.close()
        self._folder.cleanup()

    def times(self, case: Case, arms: Sequence[Arm], charged: Mapping[str, float]) -> dict[str, Row]:
        """For each arm that can run: ``cold_ms``, ``disk_ms``, their stages, ``bytes_read``, ``kv_bytes``, ``peak_bytes``.

        Cold: the model has read nothing yet, so the documents are read on the way. Disk: every chunk's KV come from disk, which the
        page cache may serve.
        """
        reading = self._memory.read(case)
        self._disk.read(case)
        found = {}
        for arm in arms:
            if arm.suits(case):
                with contextlib.suppress(*REFUSALS):  # the row of its answer says why
                    found[arm.name] = self._one(case, arm, reading, charged)
        for bench in (self._memory, self._disk, self._cold):
            bench.forget(reading)
        return found

    def _one(self, case: Case, arm: Arm, reading: CaseChunks, charged: Mapping[str, float]) -> Row:
        chunks, method = reading.given(arm, case, charged)
        with Peak(self._memory.engine.decoder.device) as peak:
            prompt, _ = self._memory.fuse(chunks, case, method, arm.rotated)
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in prompt.past_key_values.layers)
        del prompt
        self._cold.forget(reading)
        cold, cold_ms = self._cold.fuse(chunks, case, method, arm.rotated)
        disk, disk_ms = self._disk.fuse(chunks, case, method, arm.rotated)
        return {
            "cold_ms": round(cold_ms, 3),
            "cold_read_ms": round(cold.report.milliseconds["read"], 3),
            "disk_ms": round(disk_ms, 3),
            "disk_place_ms": round(disk.report.milliseconds["place"], 3),
            "bytes_read": disk.report.bytes_read,
            "kv_bytes": kv_bytes,
            "peak_bytes": peak.bytes,
        }


class Peak:
    """The most memory that a block takes above what was taken before it.

    Attributes:
        bytes: on CUDA what torch allocated; on Linux the process's resident memory; ``None`` where neither can be known.
    """

    def __init__(self, device: torch.device):
        self._cuda = device if device.type == "cuda" else None
        self.bytes: int | None = None

    def __enter__(self) -> Self:
        gc.collect()
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before: int | None = torch.cuda.memory_allocated(self._cuda)
            return self
        with contextlib.suppress(OSError, AttributeError):  # glibc: freed memory would hide what is taken next
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
            self._before = _high_water()
        except (OSError, StopIteration):
            self._before = None
        return self

    def __exit__(self, *exc: object) -> None:
        if self._cuda is not None:
            self.bytes = torch.cuda.max_memory_allocated(self._cuda) - (self._before or 0)
        elif self._before is not None:
            self.bytes = max(0, _high_water() - self._before)


def _high_water() -> int:
    with open("/proc/self/status", errors="replace") as status:  # the process's name need not be Unicode
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
