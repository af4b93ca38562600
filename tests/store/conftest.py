from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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


def run_forked(work: Callable[[], object], *, kill_after_s: float | None = None, timeout_s: float = 60) -> str:
    """Runs ``work`` in a forked child and returns what it returned, as text.

    A child that is killed by a signal, by us or by a fault, returns ``"signal N"`` behind what ``work`` printed so far;
    one that raises returns the traceback.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        signal.alarm(int(timeout_s))
        torch.set_num_threads(1)
        try:
            os.dup2(writer, 1)
            text = str(work())
        except BaseException:
            text = "raised\n" + traceback.format_exc()
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(process, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(process, 0)
    return text + (f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "")


@pytest.fixture
def forked() -> Callable[..., str]:
    return run_forked
