"""CUDA graphs: what a block launches on the device is recorded once and replayed as one (PyTorch's notes on CUDA semantics).

All that touches CUDA graphs is here. It has not run on a GPU yet.

``torch.cuda.graph`` is not used: it waits for the device as a whole, which another thread's capture forbids, and gives back what
PyTorch keeps of memory, of the host's too, so that everybody pays for it anew behind each capture.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from ragkv.scheduling.memory import unused_bytes

#: Asked by a body before it goes on to a layer that others fill: its graph ends there, and another begins.
Cut = Callable[[int], object]
#: Runs on fixed tensors alone; returns one that the next run writes anew.
Body = Callable[[Cut], Tensor]
#: Runs a body's graphs; between two of them it says at which layer the body was cut.
Replay = Callable[[Cut], Tensor]

#: PyTorch: one capture at a time in a process; in some versions neither a replay nor random numbers of the device beside it. Held
#: while launches are recorded, which takes what Python takes for them; the device is not waited for.
capturing = Lock()
# Of the device's memory: where less is free, PyTorch gives back what it keeps before it captures, for then it cannot.
_SCARCE = 1 / 16
# Graphs whose capture failed: PyTorch's allocator goes on asking them.
_failed: list[Any] = []


class Capture(Protocol):
    """Makes graphs of bodies."""

    def __call__(self, body: Body) -> Replay:
        """Record a body without running it; what is returned replays it. Raises whatever goes wrong."""

    def usable(self) -> bool:
        """Whether a graph may run in this thread just now."""

    def settle(self) -> None:
        """Wait until the device has done what graphs and this thread gave it, before what they read and write is let go."""

    def free_bytes(self) -> int:
        """Memory of the device that nobody uses."""


class CudaCapture:
    """Captures on one GPU; its graphs share a memory pool, so what one leaves in it the next may overwrite.

    PyTorch ends a pool with its last graph, and captures nothing more in it: the next graph behind that begins another.

    Args:
        device: where all tensors are.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
        self._used = WeakSet[Replay]()  # graphs of the pool

    def __call__(self, body: Body) -> Replay:
        """See :class:`Capture`. The body runs once on the stream where it is captured, as PyTorch asks for."""
        stream, default = self._stream, torch.cuda.default_stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_stream(default)
            try:
                body(lambda layer: None)
                with capturing, _no_garbage():
                    if not self._used:
                        self._pool = torch.cuda.graph_pool_handle()
                    out, cuts, graphs = self._record(body)
            finally:
                default.wait_stream(stream)  # what the body read and wrote may be let go behind this

        def replay(between: Cut) -> Tensor:
            _replay(graphs[0])
            for layer, graph in zip(cuts, graphs[1:], strict=True):
                between(layer)
                _replay(graph)
            return out

        self._used.add(replay)
        return replay

    def _record(self, body: Body) -> tuple[Tensor, list[int], list[Any]]:
        """What the body returns, at which layers it is cut, and the graphs before, between and behind these."""
        cuts, graphs = list[int](), list[Any]()

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            # Other threads load, store and allocate meanwhile.
            graphs[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

        def cut(layer: int) -> None:
            graphs[-1].capture_end()
            cuts.append(layer)
            begin()

        free, whole = torch.cuda.mem_get_info(self._device)
        if free < _SCARCE * whole:
            torch.cuda.empty_cache()
        try:
            begin()
            out = body(cut)
            graphs[-1].capture_end()
        except BaseException:
            self._recover(graphs)
            raise
        return out, cuts, graphs

    def _recover(self, failed: list[Any]) -> None:
        """Ends what failed. That may fail too: PyTorch's random numbers, and its allocator, are then left as if it went on.

        A capture that goes well ends that for the numbers. The allocator keeps the graph, and its pool is not used again.
        """
        for graph in failed[-1:]:
            with suppress(RuntimeError):
                graph.capture_end()
        with suppress(RuntimeError, AttributeError):  # else no memory is taken back that another stream used
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        _failed.extend(failed)
        self._used.clear()
        graph = torch.cuda.CUDAGraph()
        with suppress(RuntimeError):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                torch.zeros(1, device=self._device)
            finally:
                graph.capture_end()

    def usable(self) -> bool:
        """On the default stream alone: graphs and their buffers are ordered by it."""
        return torch.cuda.current_stream(self._device) == torch.cuda.default_stream(self._device)

    def settle(self) -> None:
        """See :class:`Capture`. Not by the device as a whole, which fails where another thread captures, and its capture too."""
        for stream in (torch.cuda.default_stream(self._device), torch.cuda.current_stream(self._device)):
            stream.synchronize()

    def free_bytes(self) -> int:
        """What no process has, and what PyTorch keeps for what comes."""
        return torch.cuda.mem_get_info(self._device)[0] + unused_bytes(self._device)


def _replay(graph: Any) -> None:
    with capturing:
        graph.replay()


@contextmanager
def _no_garbage() -> Iterator[None]:
    """A block in which Python collects none: an answer that ends there may wait for the device, which would break the capture."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
