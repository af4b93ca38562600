"""Where the time of one prompt goes: by the host's clock on the CPU, by events in the device's stream elsewhere.

A device runs behind the host: what the host's clock shows there is the time to launch. Events are recorded between the stages and
read when somebody asks, so that nothing waits for them before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

STAGES = ("read", "place", "select", "compute")


class HostClock:
    """Moments on the host."""

    def mark(self) -> Any:
        """This moment."""
        return perf_counter()

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one moment to another."""
        return end - begin


class EventClock:
    """Moments in a device's stream.

    Args:
        module: ``torch.cuda``, or another device's module of the same kind.
        devices: that work; the first one's stream is timed, and takes in what was given to the others by then.
    """

    def __init__(self, module: Any, devices: Sequence[torch.device]):
        self._module, self._device, self._others = module, devices[0], devices[1:]

    def mark(self) -> Any:
        """The moment at which the device has done what it was given so far."""
        stream = self._module.current_stream(self._device)
        for device in self._others:
            stream.wait_event(self._module.current_stream(device).record_event())
        return stream.record_event(self._module.Event(enable_timing=True))

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one moment to another; waits until the device has come there."""
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def clock(devices: Sequence[torch.device]) -> HostClock | EventClock:
    """The clock that tells the time of work on some devices."""
    working = [device for device in dict.fromkeys(devices) if device.type in ("cuda", "xpu")]
    return EventClock(torch.get_device_module(working[0]), working) if working else HostClock()


class Timer:
    """The stages of one prompt, one at a time: a stage inside another one interrupts it.

    Args:
        clock: tells the time; the host's by default.
        begin: ``perf_counter()`` at which the prompt was asked for; now if not given.
    """

    def __init__(self, clock: HostClock | EventClock | None = None, begin: float | None = None):
        self._clock = HostClock() if clock is None else clock
        self._before = 0.0 if begin is None else perf_counter() - begin
        self._marks: list[tuple[Any, str]] = []
        self._read: dict[str, float] | None = None
        self._enter("")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count a block to a stage; to the one around it again afterwards."""
        around = self._marks[-1][1]
        self._enter(name)
        try:
            yield
        finally:
            self._enter(around)

    def milliseconds(self) -> dict[str, float]:
        """By stage, and ``total`` from the beginning to the end of the last stage. Waits for the device, the first time."""
        if self._read is None:
            spent: dict[str, float] = defaultdict(float, dict.fromkeys(STAGES, 0.0))
            for (begin, name), (end, _) in zip(self._marks, self._marks[1:], strict=False):
                spent[name] += self._clock.between(begin, end) * 1e3
            total = sum(spent.values()) + self._before * 1e3
            spent.pop("", None)
            self._read = {**spent, "total": total}
        return dict(self._read)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "_clock": HostClock(),
            "_marks": [],
            "_read": self.milliseconds(),
        }  # no event leaves its device

    def _enter(self, name: str) -> None:
        self._read = None
        self._marks.append((self._clock.mark(), name))
