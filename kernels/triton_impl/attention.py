"""Attention of scattered queries, each over its own run of keys, with online softmax (FlashAttention-2, arXiv:2307.08691).

H query heads, K kv heads, S queries, N keys, D head_dim. The rows of a tile are queries and, within a query, the H / K heads that
share a kv head: the fewer queries a tile holds, the closer their spans, and the fewer keys are read for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragkv.kernels.dispatch import interpreting
from ragkv.kernels.triton_impl.launch import block, in_rows

_LOG2E = 1.4426950408889634


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` in fp32. Triton's interpreter knows no product of bf16 numbers: they are "widened" for it."""
    if PRECISION == "widened":
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        result = tl.dot(a, b, total, input_precision=PRECISION)
    return result


@triton.jit
def scores_of(query, key, scale, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """``[M, N]`` fp32 scores times log2(e), of ``query [M, D]`` and ``key [N, D]``; ``scale`` has log2(e) in it unless CAPPED."""
    nothing = tl.zeros([query.shape[0], key.shape[0]], tl.float32)
    scores = product(query, tl.trans(key), nothing, PRECISION) * scale
    if CAPPED:  # tanh(x) = 2 sigmoid(2 x) - 1
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * 1.4426950408889634
    return scores


@triton.jit
def rows_of(tile, spans, length, keys, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query, head within its group, first and last key of a tile's rows; rows behind the last query repeat it."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = tl.minimum(row // GROUPS, length - 1)
    first = tl.maximum(tl.load(spans + 2 * query), 0)
    last = tl.minimum(tl.load(spans + 2 * query + 1), keys - 1)
    return row, query, row % GROUPS, first, last


@triton.jit
def _attend(
    state,
    query,
    key,
    value,
    key_stride,
    value_stride,
    first,
    last,
    pieces,
    keys,
    scale,
    softcap,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Take two pieces of blocks of keys into the running maximum, sum and output of every row; their order does not matter."""
    greatest, total, output = state
    begin, count, then, more = pieces
    dim = tl.arange(0, BLOCK_D)
    value_dim = tl.arange(0, BLOCK_V)
    step = tl.arange(0, BLOCK_N)
    key_at = step[:, None] * key_stride + dim[None, :]
    value_at = step[:, None] * value_stride + value_dim[None, :]
    for number in range(count + more):
        block = tl.where(number < count, begin + number, then + number - count)
        start = block.to(tl.int64) * BLOCK_N
        held = (step < keys - start)[:, None] if MASKED else (step >= 0)[:, None]
        k = tl.load(key + start * key_stride + key_at, mask=held & (dim < DIM)[None, :], other=0.0)
        scores = scores_of(query, k, scale, softcap, CAPPED, PRECISION)
        if MASKED:
            at = block * BLOCK_N + step
            seen = (at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(greatest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(greatest - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(value + start * value_stride + value_at, mask=held & (value_dim < VALUE_DIM)[None, :], other=0.0)
        output = product(weights.to(v.dtype), v, output * shrink[:, None], PRECISION)
        greatest = higher
    return greatest, total, output


@triton.jit(do_not_specialize=["length", "keys"])
def attention_kernel(
    query,
    key,
    value,
    out,
    spans,
    sinks,
    length,
    keys,
    scale,
    softcap,
    query_head_stride,
    query_stride,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    GROUPS: tl.constexpr,
    CAPPED: tl.constexpr,
    SUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: BLOCK_M rows of one kv head. Grid: tiles of rows, K. The last tiles, which see most keys, come first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    row, at, member, first, last = rows_of(tile, spans, length, keys, GROUPS, BLOCK_M)
    head = kv_head * GROUPS + member
    dim = tl.arange(0, BLOCK_D)
    place = head[:, None].to(tl.int64) * query_head_stride + at[:, None].to(tl.int64) * query_stride
    q = tl.load(query + place + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
    key += kv_head.to(tl.int64) * key_head_stride
    value += kv_head.to(tl.int64) * value_head_stride

    # Blocks of keys: all rows see those from `open` to `shut`, which need no mask; before and behind, only some rows do.
    begin = tl.min(first, 0) // BLOCK_N
    end = tl.cdiv(tl.max(last, 0) + 1, BLOCK_N)
    open = tl.minimum(tl.maximum(tl.cdiv(tl.max(first, 0), BLOCK_N), begin), tl.maximum(end, begin))
    shut = tl.maximum((tl.min(last, 0) + 1) // BLOCK_N, open)
    edges = (begin, open - begin, shut, tl.maximum(end - shut, 0))
    inner = (open, shut - open, shut, 0)

    if SUNK:
        greatest = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        greatest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    state = (greatest, total, tl.zeros([BLOCK_M, BLOCK_V], tl.float32))
    state = _attend(
        state, q, key, value, key_stride, value_stride, first, last, edges, keys, scale, softcap,
        True, CAPPED, PRECISION, DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    state = _attend(
        state, q, key, value, key_stride, value_stride, first, last, inner, keys, scale, softcap,
        False, CAPPED, PRECISION, DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    greatest, total, output = state
    output = output / tl.where(total > 0, total, 1.0)[:, None]
    value_dim = tl.arange(0, BLOCK_V)
    place = (at[:, None].to(tl.int64) * (tl.num_programs(1) * GROUPS) + head[:, None]) * VALUE_DIM + value_dim[None, :]
    written = (row < length * GROUPS)[:, None] & (value_dim < VALUE_DIM)[None, :]
    tl.store(out + place, output.to(out.dtype.element_ty), mask=written)


def tuning(dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, int]:
    """Tile sizes, warps and stages: the largest tiles that spill no registers and fit into shared memory.

    Args:
        dim: the wider of D and Dv.
        dtype: of query, key and value.
        capability: of the GPU.
    """
    wide = block(dim, 16)
    # Hopper's and Blackwell's matrix units take operands from shared memory, of which they have 227 KB; the others from registers.
    roomy = 9 <= capability[0] < 12
    if dtype == torch.float32:
        rows, columns, warps, stages = (16, 16, 8, 1) if wide > 128 else (16, 32, 4, 2) if wide > 64 else (32, 32, 4, 2)
    elif wide <= 64:
        rows, columns, warps, stages = 128, 64, 8, 3
    elif wide <= 128:
        rows, columns, warps, stages = 128, 64 if roomy else 32, 8, 3
    else:
        rows, columns, warps, stages = 64, 32, 8, 2
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": stages}


def constants(groups: int, dim: int, value_dim: int, dtype: torch.dtype, *, capped: bool, sunk: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments, tile sizes apart."""
    # fp32 as three tf32 products is nearly exact and uses the matrix units; the widest heads do not fit into registers so.
    exact = "ieee" if max(dim, value_dim) > 128 else "tf32x3"
    return {
        "GROUPS": groups,
        "CAPPED": capped,
        "SUNK": sunk,
        "PRECISION": "widened" if interpreting() else exact if dtype == torch.float32 else "tf32",
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": block(dim, 16),
        "BLOCK_V": block(value_dim, 16),
    }


def capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; that of an A100 under the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def selective_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """See :func:`ragkv.kernels.selective_attention`."""
    query, key, value, spans = in_rows(query), in_rows(key), in_rows(value), spans.contiguous()
    heads, length, dim = query.shape
    kv_heads, keys, value_dim = value.shape
    out = query.new_empty(length, heads, value_dim)
    if not out.numel():
        return out
    fixed = constants(
        heads // kv_heads, dim, value_dim, query.dtype, capped=softcap is not None, sunk=sinks is not None
    )
    sizes = tuning(max(dim, value_dim), query.dtype, capability(query.device))
    grid = (triton.cdiv(length * fixed["GROUPS"], sizes["BLOCK_M"]), kv_heads)
    attention_kernel[grid](
        *(query, key, value, out, spans, spans if sinks is None else sinks.contiguous(), length, keys),
        *(scale if softcap is not None else scale * _LOG2E, softcap or 1.0),
        *(*query.stride()[:2], *key.stride()[:2], *value.stride()[:2]),
        **fixed,
        **sizes,
    )
    return out
