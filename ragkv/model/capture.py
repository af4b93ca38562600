"""CUDA graphs: what a block launches on the device is recorded once and replayed as one (PyTorch's notes on CUDA semantics).

All that touches ``torch.cuda.graph`` is here. It has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

#: Asked by a body before it goes on to a layer that others fill: its graph ends there, and another begins.
Cut = Callable[[int], object]
#: Runs on fixed tensors alone; returns one that the next run writes anew.
Body = Callable[[Cut], Tensor]
#: Runs a body's graphs; between two of them it says at which layer the body was cut.
Replay = Callable[[Cut], Tensor]

#: PyTorch: one capture at a time in a process; and, in some versions, no random numbers of the device beside it.
capturing = Lock()
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

    Args:
        device: where all tensors are.
    """

    def __init__(self, device: torch.device):
        self._device = device
        with torch.cuda.device(device):
            self._pool: Any = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def __call__(self, body: Body) -> Replay:
        """See :class:`Capture`. The body runs once on the stream where it is captured, as PyTorch asks for."""
        stream, cuts, graphs = self._stream, list[int](), [torch.cuda.CUDAGraph()]
        # Other threads load, store and allocate meanwhile.
        how: dict[str, Any] = {"pool": self._pool, "capture_error_mode": "thread_local"}

        def cut(layer: int) -> None:
            graphs[-1].capture_end()
            cuts.append(layer)
            graphs.append(torch.cuda.CUDAGraph())
            recording.cuda_graph = graphs[-1]  # which it ends
            graphs[-1].capture_begin(**how)

        # What is left by a capture that fails is the outer block's to undo: the inner one then leaves its stream in place.
        with capturing, torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream(self._device))
            body(lambda layer: None)
            recording = torch.cuda.graph(graphs[0], stream=stream, **how)
            try:
                with recording:
                    out = body(cut)
            except BaseException:
                self._recover(graphs)
                raise
        torch.cuda.default_stream(self._device).wait_stream(stream)

        def replay(between: Cut) -> Tensor:
            graphs[0].replay()
            for layer, graph in zip(cuts, graphs[1:], strict=True):
                between(layer)
                graph.replay()
            return out

        return replay

    def _recover(self, failed: list[Any]) -> None:
        """A capture that failed leaves PyTorch's random numbers, and its allocator, as if it went on.

        One that goes well ends that for the numbers; the allocator keeps the graph, and takes its pool for one in use.
        """
        _failed.extend(failed)
        self._pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with suppress(RuntimeError), torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=self._device)

    def usable(self) -> bool:
        """On the default stream alone: graphs and their buffers are ordered by it."""
        return torch.cuda.current_stream(self._device) == torch.cuda.default_stream(self._device)

    def settle(self) -> None:
        """See :class:`Capture`. Not by the device as a whole, which fails where another thread captures, and its capture too."""
        for stream in (torch.cuda.default_stream(self._device), torch.cuda.current_stream(self._device)):
            stream.synchronize()

    def free_bytes(self) -> int:
        """What no process has, and what PyTorch keeps for what comes."""
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + kept
