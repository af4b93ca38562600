"""How the GPU benchmarks measure, and the rows that they write."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

import ragkv
from ragkv.kernels import Impl


@dataclass
class Bench:
    """Where and how large.

    Attributes:
        device: what is measured.
        tiny: sizes at which everything runs on a CPU within seconds; the figures then mean nothing.
        rounds: measurements of each kind; medians are compared, all are written.
        path: raw rows, one JSON object a line.
        tokens: lengths of prompts to measure, instead of each benchmark's own.
        shape: of the model, where one runs (:data:`bench_ttft.SHAPES`).
    """

    device: torch.device
    tiny: bool
    rounds: int
    path: Path | None
    tokens: tuple[int, ...] = ()
    shape: str = "8b"
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """bf16; fp32 where the CPU is."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def impl(self) -> Impl:
        """What is measured: the Triton version, or under ``tiny`` on a CPU the reference."""
        return "triton" if self.device.type == "cuda" else "reference"

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of torch's copy of 1 GiB: what memory-bound kernels are held against."""
        source = torch.empty((1 << 20) if self.tiny else (1 << 30), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        seconds = statistics.median(self.seconds(lambda: target.copy_(source)))
        self.write(
            benchmark="copy", bytes=2 * source.numel(), seconds=seconds, bytes_per_s=2 * source.numel() / seconds
        )
        return 2 * source.numel() / seconds

    @cached_property
    def bus_bandwidth(self) -> float:
        """Bytes per second from pinned CPU memory to the device, of a copy of 256 MiB."""
        cuda = self.device.type == "cuda"
        source = torch.empty((1 << 20) if self.tiny else (1 << 28), dtype=torch.uint8, pin_memory=cuda)
        target = torch.empty_like(source, device=self.device)
        seconds = statistics.median(self.seconds(lambda: target.copy_(source, non_blocking=True)))
        self.write(benchmark="bus", bytes=source.numel(), seconds=seconds, bytes_per_s=source.numel() / seconds)
        return source.numel() / seconds

    def lengths(self, tiny: int, *full: int) -> tuple[int, ...]:
        """The lengths of prompts that a benchmark is run at."""
        return self.tokens or ((tiny,) if self.tiny else full)

    def timed(self, call: Callable[[], Any], *, size: int = 0, flops: int = 0, **row: Any) -> None:
        """Measure a call on the device and write the row: ``size`` bytes, or FLOPs, over its median seconds."""
        seconds = self.seconds(call)
        middle = statistics.median(seconds)
        row |= {"impl": self.impl, "seconds": seconds, "host_seconds": self.host(call)}
        if size:
            row |= {"bytes": size, "bytes_per_s": size / middle, "of_copy": size / middle / self.copy_bandwidth}
        if flops:
            row |= {"flops": flops, "flops_per_s": flops / middle}
        self.write(**row)

    def seconds(self, run: Callable[[], Any], rounds: int | None = None) -> list[float]:
        """Time on the device alone, summed over the kernels of one call, which finds nothing of its own in the cache.

        Launches and Python are not in it.
        """
        if self.device.type != "cuda":
            return self.wall(run)
        for _ in range(3):
            run()
        other = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)  # more than the GPU's cache holds
        times = []
        for _ in range(rounds or self.rounds):
            other.zero_()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                run()
                torch.cuda.synchronize()
            times.append(sum(event.self_device_time_total for event in profile.key_averages()) * 1e-6)
        if not min(times):
            raise RuntimeError("PyTorch's profiler saw no kernels: CUPTI does not work here")
        return times

    def wall(self, run: Callable[[], Any]) -> list[float]:
        """Time as a caller sees it, from an idle device to an idle device."""
        run()
        times = []
        for _ in range(self.rounds):
            self.sync()
            begin = time.perf_counter()
            run()
            self.sync()
            times.append(time.perf_counter() - begin)
        return times

    def host(self, run: Callable[[], Any]) -> float:
        """Median time until the call returns: checks and launches, while the device works on."""
        times = []
        for _ in range(self.rounds):
            self.sync()
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self) -> int:
        """The most bytes of the GPU that tensors took since this was asked for last; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def write(self, **row: Any) -> None:
        """Keep a row: to the screen, and to the file with its conditions."""
        self.rows.append(row)
        print("  ".join(f"{name} {_short(value)}" for name, value in row.items()), file=sys.stderr, flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({**row, **self.conditions}) + "\n")

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """What every row must say to be worth something."""
        cuda = self.device.type == "cuda"
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor() or platform.machine(),
            "tiny": self.tiny,
            "shape": self.shape,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _triton(),
            "transformers": transformers.__version__,
            "ragkv": ragkv.__version__,
        }


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
