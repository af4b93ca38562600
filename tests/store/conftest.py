from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ragkv.chunk import ChunkKV
from ragkv.store import chunk_key


def random_kv(
    seed: int = 0,
    *,
    tokens: int = 5,
    layers: int = 3,
    heads: int = 2,
    dim: int = 8,
    base: int = 7,
    dtype: torch.dtype = torch.float32,
) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)

    def tensor() -> torch.Tensor:
        return torch.randn(heads, tokens, dim, generator=generator).to(dtype)

    return ChunkKV([tensor() for _ in range(layers)], [tensor() for _ in range(layers)], base)


def key_of(number: int) -> bytes:
    return chunk_key("space", [number], b"")


def assert_same(got: ChunkKV | None, want: ChunkKV) -> None:
    assert got is not None
    assert got.base == want.base
    assert len(got.keys) == len(want.keys)
    for a, b in zip((*got.keys, *got.values), (*want.keys, *want.values), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.fixture
def kv() -> Callable[..., ChunkKV]:
    """Makes a chunk's KV out of a seed."""
    return random_kv


@pytest.fixture
def key() -> Callable[[int], bytes]:
    """The key of a number."""
    return key_of


@pytest.fixture
def same() -> Callable[[ChunkKV | None, ChunkKV], None]:
    """Asserts that two KV are equal, bit for bit."""
    return assert_same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "kv"


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU; its numbers are on the CPU."""

    @staticmethod
    def __new__(cls, numbers):
        shape = numbers.shape, numbers.stride(), numbers.storage_offset()
        return torch.Tensor._make_wrapper_subclass(cls, *shape, dtype=numbers.dtype, device="cuda:0")

    def __init__(self, numbers):
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func.name()} outside of the block")


def _inside(one: Any) -> Any:
    return one.numbers if isinstance(one, OnGpu) else one


class Gpu(TorchFunctionMode):
    """A block of this thread in which there is a GPU, as far as the store can tell.

    Attributes:
        pinned: sizes of what was pinned.
        waits: what the host waited for, by name.
        done: operations on the GPU, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[int] = []
        self.waits: list[str] = []
        self.done: list[str] = []
        self._pins: dict[int, torch.Tensor] = {}  # kept, so that nothing else comes to lie there
        self._operations = Operations(self)

    def __enter__(self) -> Gpu:
        self._operations.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._operations.__exit__(*exc)

    def put(self, kv: ChunkKV) -> ChunkKV:
        """The same KV on the GPU."""
        keys, values = ([OnGpu(side.clone()) for side in sides] for sides in (kv.keys, kv.values))
        return replace(kv, keys=keys, values=values)

    def current_stream(self, device: Any) -> Any:
        event = SimpleNamespace(synchronize=lambda: self.waits.append("event"))
        return SimpleNamespace(record_event=lambda: event)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """What PyTorch refuses before it comes to an operation, where there is no GPU."""
        kwargs = dict(kwargs or {})
        device = next((one for one in (kwargs.get("device"), *args[1:2]) if isinstance(one, str | torch.device)), "cpu")
        on_gpu = torch.device(device).type == "cuda"
        if func is torch.Tensor.to and on_gpu and not isinstance(args[0], OnGpu):
            self.copied(args[0], kwargs.get("non_blocking", False))
            return OnGpu(args[0].clone())
        if func is torch.Tensor.copy_ and isinstance(args[0], OnGpu):
            if not isinstance(args[1], OnGpu):
                self.copied(args[1], kwargs.get("non_blocking", False))
            args[0].numbers.copy_(_inside(args[1]))
            self.done.append("copy_")
            return args[0]
        if func in (torch.Tensor.__setitem__, torch.Tensor.__getitem__) and isinstance(args[0], OnGpu):
            result = func(*tree_map(_inside, args))
            self.done.append(func.__name__)
            return None if result is None else OnGpu(result)
        if func is torch.empty and on_gpu:
            return OnGpu(torch.empty(*args, **{**kwargs, "device": "cpu"}))
        if func in (torch.tensor, torch.as_tensor) and on_gpu:
            self.waits.append("tensor")
            return OnGpu(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.arange and on_gpu:
            return OnGpu(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.empty and kwargs.pop("pin_memory", False):
            made = torch.empty(*args, **kwargs)
            self.pinned.append(made.numel() * made.element_size())
            self._pins[made.untyped_storage().data_ptr()] = made
            return made
        return func(*args, **kwargs)

    def copied(self, host: torch.Tensor, non_blocking: bool) -> None:
        """A copy between the GPU and a tensor of the host."""
        if not non_blocking or host.untyped_storage().data_ptr() not in self._pins:
            self.waits.append("copy_" if not non_blocking else "copy_, not pinned")


class Operations(TorchDispatchMode):
    """See :class:`Gpu`."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name().removeprefix("aten::").partition(".")[0], dict(kwargs or {})
        there = any(isinstance(one, OnGpu) for one in tree_leaves((args, kwargs)))
        to_cpu = there and name == "_to_copy" and str(kwargs.get("device")) == "cpu"
        if name == "copy_" and isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu):
            self.gpu.copied(args[isinstance(args[0], OnGpu)], len(args) > 2 and args[2])
        elif to_cpu or (there and name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")):
            self.gpu.waits.append(name)
        kwargs.pop("device", None) if there else None
        result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if not there or to_cpu or (name == "copy_" and not isinstance(args[0], OnGpu)):
            return args[0] if there and name == "copy_" else result
        self.gpu.done.append(name)
        return args[0] if name.endswith("_") else tree_map_only(torch.Tensor, OnGpu, result)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """What stands for a GPU in a block of this thread: it counts what is done there and waited for."""
    mode = Gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", mode.current_stream)
    return mode


@pytest.fixture
def on_gpu() -> type[OnGpu]:
    """Has a tensor lie on it."""
    return OnGpu
