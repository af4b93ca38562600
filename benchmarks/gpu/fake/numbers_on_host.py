"""Numbers for a GPU that is not there: operations run on the host over the memory of CUDA tensors, Triton interprets its kernels.

While a stream is captured nothing runs. What would have is kept with the graph, over the same addresses, and runs when that is
replayed. Where work is done late (late.cpp) what runs is given to the stream, and read is what stands there by then: but for what
CUDA takes a copy of, which is all memory of the host that is not pinned.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

#: Work is done when it is waited for, not when it is given.
LATE = "FAKE_CUDA_LATE" in os.environ
#: What makes memory, or says something of it.
_MEMORY = (
    *("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "set_", "resize_", "record_stream"),
    *("is_pinned", "_pin_memory", "pin_memory", "_local_scalar_dense"),
)
#: Whose result, or its shape, goes by numbers: CUDA waits for them.
_COUNTED = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal")

_fake = ctypes.CDLL("libcudart.so.13")
_recording: dict[int, list[Callable[[], object]]] = {}  # by thread: what is captured
# By number: what streams have not done yet, and where it was given.
_given: dict[int, tuple[Callable[[], object], traceback.StackSummary]] = {}
_numbers = count()
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
        direct = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:] == (True,))
        written = [each for each, said in zip(args, func._schema.arguments, strict=False) if said.is_write]
        here = partial(_here, pinned=direct, written=written)
        args_here, kwargs_here = tree_map(here, args), tree_map(here, kwargs)
        kwargs_here.pop("pin_memory", None)
        masks = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        if (masks or name in _COUNTED) and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
            return tree_map(_moved, func(*args_here, **kwargs_here))
        out = func(*args, **kwargs)
        out_here = tree_map(on_host, out)

        def run() -> None:
            first = (args_here[0].float(),) if name == "histc" else args_here[:1]  # of whole numbers only CUDA has it
            got = func(*first, *args_here[1:], **kwargs_here)
            for target, source in zip(tree_flatten(out_here)[0], tree_flatten(got)[0], strict=True):
                if isinstance(target, Tensor) and target.data_ptr() != source.data_ptr():
                    target.copy_(source)

        _given_to_stream(run)
        if any(_on_cpu(each) and not (direct and each.is_pinned()) for each in tree_flatten(out)[0]):
            torch.cuda.current_stream().synchronize()
        return out


def _on_cpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def _here(value: Any, pinned: bool, written: list[Any]) -> Any:
    """What an operation is given on the host: a copy of what may be another when it runs."""
    if LATE and _on_cpu(value) and not (pinned and value.is_pinned()) and not any(value is each for each in written):
        return value.clone()
    return on_host(value)


def _moved(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")
    target = on_host(made)
    _given_to_stream(lambda: target.copy_(value))  # behind what others were given, who had this memory before
    return made


def _given_to_stream(run: Callable[[], object]) -> None:
    """Runs it now, or by and by, or keeps it for the graph that is captured."""
    if torch.cuda.is_current_stream_capturing():
        _recording[threading.get_ident()].append(run)
    elif LATE:
        number, frames = next(_numbers), traceback.walk_stack(None)
        _given[number] = run, traceback.StackSummary.extract(frames, lookup_lines=False)
        _fake.fake_give(ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), _called, number)
    else:
        run()


@ctypes.CFUNCTYPE(None, ctypes.c_long)
def _called(number: int) -> None:
    run, begun = _given.pop(number)
    try:
        with _disable_current_modes(), torch.inference_mode():
            run()
    except BaseException:  # nobody above could be told
        print(*begun.format()[::-1], "".join(traceback.format_exc()), sep="\n", file=sys.stderr)
        os._exit(70)


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
        kept = self.kept

        def run() -> None:
            for each in kept:
                each()

        with _disable_current_modes():
            _given_to_stream(run)

    graph.capture_begin, graph.capture_end, graph.replay = capture_begin, capture_end, replayed


def _kernels() -> None:
    from ragkv.kernels import reference_attention
    from ragkv.kernels.triton_impl import attention, place, scatter, scores
    from ragkv.kernels.triton_impl.launch import launch as plain

    def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, /, *arguments: Any, **constants: Any) -> None:
        if device.type == "cpu":
            plain(kernel, grid, device, *arguments, **constants)
            return
        with _disable_current_modes():
            _fake.fake_launch(ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), b"triton: a kernel")
            here = [on_host(each) for each in arguments]

            def run() -> None:
                with _one_kernel:
                    plain(kernel, grid, torch.device("cpu"), *here, **constants)

            _given_to_stream(run)

    for module in (attention, place, scatter, scores):
        module.launch = launch  # type: ignore[attr-defined]
    if LATE:
        attention.selective_attention = _attends(reference_attention.selective_attention)
        scores.scored_attention = _attends(reference_attention.scored_attention)


def _attends(reference: Callable[..., Any]) -> Callable[..., Any]:
    """In place of kernels that the interpreter takes most of its time for."""

    def attention(*given: Any, window: int | None = None) -> Any:
        with _disable_current_modes():
            query, key, value, *_ = given
            out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
            sums = torch.empty(key.shape[1], dtype=torch.float32, device=key.device)
            _fake.fake_launch(ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), b"attention")
            *tensors, scoring = map(on_host, given)
            scoring = scoring._replace(sinks=on_host(scoring.sinks))
            targets = on_host(out), on_host(sums)

            def run() -> None:
                found = reference(*tensors, scoring)
                for target, got in zip(targets, found if isinstance(found, tuple) else (found,), strict=False):
                    target.copy_(got)

            _given_to_stream(run)
            return (out, sums) if reference.__name__ == "scored_attention" else out

    return attention
