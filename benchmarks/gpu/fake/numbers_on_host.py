"""Numbers for a GPU that is not there: operations run on the host over the memory of CUDA tensors, Triton interprets its kernels.

While a stream is captured nothing runs. What would have is kept with the graph, over the same addresses, and runs when that is
replayed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

#: What makes memory, or says something of it.
_MEMORY = (
    *("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "set_", "resize_", "record_stream"),
    *("is_pinned", "_pin_memory", "pin_memory", "_local_scalar_dense"),
)
#: Whose result's shape goes by numbers.
_COUNTED = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "index", "bincount")

_recording: dict[int, list[Callable[[], None]]] = {}  # by thread: what is captured
_one_kernel = threading.RLock()  # the interpreter changes triton's language while it runs one


def on_host(value: Any) -> Any:
    """A CPU tensor over the memory of a CUDA tensor; the CPU for a device."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    memory = value.untyped_storage()
    if not memory.nbytes():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    raw = (ctypes.c_char * memory.nbytes()).from_address(memory.data_ptr())
    storage = torch.frombuffer(raw, dtype=torch.uint8).untyped_storage()
    made = torch.empty(0, dtype=value.dtype)
    return made.set_(storage, value.storage_offset(), value.size(), value.stride())


class OnHost(TorchDispatchMode):
    """Runs an operation twice: by CUDA, which allocates, checks and computes nothing, then on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        given = tree_flatten((args, kwargs))[0]
        places = [each.device if isinstance(each, Tensor) else each for each in given]
        cuda = any(isinstance(place, torch.device) and place.type == "cuda" for place in places)
        views = any(each.alias_info and not each.alias_info.is_write for each in func._schema.arguments)
        if not cuda or name in _MEMORY or (views and name not in ("_to_copy", "contiguous")):
            return func(*args, **kwargs)
        args_here, kwargs_here = tree_map(on_host, args), tree_map(on_host, kwargs)
        kwargs_here.pop("pin_memory", None)
        if name == "histc":  # of whole numbers only CUDA has it
            args_here = (args_here[0].float(), *args_here[1:])
        if name in (*_COUNTED, "equal") and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
            return tree_map(_moved, func(*args_here, **kwargs_here))
        out = func(*args, **kwargs)
        out_here = tree_map(on_host, out)

        def run() -> None:
            got = func(*args_here, **kwargs_here)
            for target, source in zip(tree_flatten(out_here)[0], tree_flatten(got)[0], strict=True):
                if isinstance(target, Tensor) and target.data_ptr() != source.data_ptr():
                    target.copy_(source)

        _now_or_kept(run)
        return out


def _moved(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")
    on_host(made).copy_(value)
    return made


def _now_or_kept(run: Callable[[], None]) -> None:
    if torch.cuda.is_current_stream_capturing():
        _recording[threading.get_ident()].append(run)
    else:
        run()


def install() -> None:
    """For this process and all of its threads."""
    _graphs()
    _kernels()
    plain = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with OnHost():
            plain(self)

    threading.Thread.run = run  # type: ignore[method-assign]
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    OnHost().__enter__()


def _graphs() -> None:
    graph: Any = torch.cuda.CUDAGraph
    begin, end, replay = graph.capture_begin, graph.capture_end, graph.replay

    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.kept = _recording[threading.get_ident()] = []

    def capture_end(self: Any) -> None:
        try:
            end(self)
        finally:
            _recording.pop(threading.get_ident(), None)

    def replayed(self: Any) -> None:
        replay(self)
        with _disable_current_modes():
            for run in self.kept:
                run()

    graph.capture_begin, graph.capture_end, graph.replay = capture_begin, capture_end, replayed


def _kernels() -> None:
    from ragkv.kernels.triton_impl import attention, place, scatter, scores
    from ragkv.kernels.triton_impl.launch import launch as plain

    fake = ctypes.CDLL("libcudart.so.13")

    def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, /, *arguments: Any, **constants: Any) -> None:
        with _disable_current_modes():
            fake.fake_launch(ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), b"triton: a kernel")
            here = [on_host(each) for each in arguments]

            def run() -> None:
                with _one_kernel:
                    plain(kernel, grid, torch.device("cpu"), *here, **constants)

            _now_or_kept(run)

    for module in (attention, place, scatter, scores):
        module.launch = launch  # type: ignore[attr-defined]
