"""Fresh keys and values to their rows of the cache, or how far they are from what is there.

H kv heads, S fresh tokens, N tokens of the prompt, D head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragkv.kernels.triton_impl.launch import block, heads_at_once, in_rows, launch

_TILE = 2048  # numbers of a tile: 16 bytes of bf16 for each of 128 threads, twice


@triton.jit
def _one_side(
    fresh,
    held,
    moved,
    at,
    token,
    inside,
    first_head,
    fresh_head_stride,
    fresh_stride,
    held_head_stride,
    held_stride,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DIM: tl.constexpr,
    COMPARE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """K or V of a tile's tokens, in HEADS heads: compared, or written. AT_ONCE of them are asked for before the first is used."""
    dim = tl.arange(0, BLOCK_D)
    filled = inside[:, None] & (dim < DIM)[None, :]
    source = fresh + token[:, None] * fresh_stride + dim[None, :]
    target = held + at[:, None] * held_stride + dim[None, :]
    squares = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first in tl.static_range(0, HEADS, AT_ONCE):
        read = ()
        for number in tl.static_range(AT_ONCE):
            head = (first_head + first + number).to(tl.int64)
            read += (tl.load(source + head * fresh_head_stride, mask=filled, other=0.0),)
        for number in tl.static_range(AT_ONCE):
            head = (first_head + first + number).to(tl.int64)
            if COMPARE:
                gap = tl.load(target + head * held_head_stride, mask=filled, other=0.0).to(tl.float32)
                gap -= read[number].to(tl.float32)
                squares += gap * gap
            else:
                tl.store(target + head * held_head_stride, read[number], mask=filled)
    if COMPARE:
        tl.store(moved + token, tl.sum(squares, 1), mask=inside)


@triton.jit(do_not_specialize=["length"])
def scatter_kernel(
    fresh_keys,
    fresh_values,
    rows,
    keys,
    values,
    moved,
    length,
    fresh_key_head_stride,
    fresh_key_stride,
    fresh_value_head_stride,
    fresh_value_stride,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    INDEXED: tl.constexpr,
    COMPARE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: BLOCK tokens of HEADS heads, of K or of V. Grid: blocks of tokens, H / HEADS, K and V."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < length
    at = tl.load(rows + token, mask=inside, other=0).to(tl.int64) if INDEXED else token
    first_head = tl.program_id(1) * HEADS
    if tl.program_id(2) == 0:
        _one_side(
            fresh_keys, keys, moved, at, token, inside, first_head,
            fresh_key_head_stride, fresh_key_stride, key_head_stride, key_stride,
            HEADS, AT_ONCE, DIM, COMPARE, BLOCK, BLOCK_D,
        )  # fmt: skip
    else:
        _one_side(
            fresh_values, values, moved, at, token, inside, first_head,
            fresh_value_head_stride, fresh_value_stride, value_head_stride, value_stride,
            HEADS, AT_ONCE, VALUE_DIM, COMPARE, BLOCK, BLOCK_V,
        )  # fmt: skip


def constants(heads: int, dim: int, value_dim: int, *, indexed: bool, compare: bool) -> dict[str, int | bool]:
    """The kernel's compile-time arguments. Distances sum over heads, so there one program takes all of them."""
    width = block(max(dim, value_dim))
    at_once = heads_at_once(heads)
    return {
        "HEADS": heads if compare else at_once,
        "AT_ONCE": at_once,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "INDEXED": indexed,
        "COMPARE": compare,
        "BLOCK": max(1, _TILE // width // (2 if compare else 1)),
        "BLOCK_D": block(dim),
        "BLOCK_V": block(value_dim),
    }


def scatter(fresh_keys: Tensor, fresh_values: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> None:
    """See :func:`ragkv.kernels.scatter`."""
    _launch(fresh_keys, fresh_values, rows, keys, values)


def deviation(fresh: Tensor, stored: Tensor, rows: Tensor | None) -> Tensor:
    """See :func:`ragkv.kernels.deviation`."""
    return _launch(fresh, None, rows, stored, None)


def _launch(
    fresh_keys: Tensor,
    fresh_values: Tensor | None,
    rows: Tensor | None,
    keys: Tensor,
    values: Tensor | None,
) -> Tensor:
    """Writes K and V; with K alone it compares, and returns the distances ``[S]`` fp32."""
    compare = fresh_values is None or values is None
    sides = 1 if compare else 2
    fresh_keys, keys = in_rows(fresh_keys), in_rows(keys) if compare else keys
    fresh_values = fresh_keys if fresh_values is None else in_rows(fresh_values)
    values = keys if values is None else values
    heads, length, dim = fresh_keys.shape
    if not length or not heads:
        return torch.zeros(length if compare else 0, dtype=torch.float32, device=keys.device)
    moved = torch.empty(length if compare else 0, dtype=torch.float32, device=keys.device)
    fixed = constants(heads, dim, fresh_values.shape[2], indexed=rows is not None, compare=compare)
    grid = (triton.cdiv(length, fixed["BLOCK"]), heads // fixed["HEADS"], sides)
    launch(
        *(scatter_kernel, grid, keys.device),
        *(fresh_keys, fresh_values, keys if rows is None else rows.contiguous(), keys, values, moved, length),
        *(*fresh_keys.stride()[:2], *fresh_values.stride()[:2], *keys.stride()[:2], *values.stride()[:2]),
        **fixed,
    )
    return moved
