from __future__ import annotations

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
