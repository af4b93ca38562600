"""How much attention a few queries pay to every key: first each query's normaliser, then the mass of every key.

H query heads, K kv heads, S queries, N keys, D head_dim, P pieces of the keys. The matrix of weights is never in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragkv.kernels.scoring import Scoring
from ragkv.kernels.triton_impl.attention import constants as attention_constants
from ragkv.kernels.triton_impl.attention import in_log2
from ragkv.kernels.triton_impl.attention_kernel import rows_of, scores_of
from ragkv.kernels.triton_impl.launch import in_rows, launch

_LOG2E = 1.4426950408889634
PIECE = 1024  # keys that one program reads for the normalisers: 64K keys of 8 heads keep every processor busy


@triton.jit
def _masked_scores(
    query, key, key_stride, start, keys, first, last, scale, softcap,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores times log2(e) of BLOCK_N keys from ``start`` on, -inf outside each row's span."""
    at = start + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    filled = (at < keys)[:, None] & (dim < DIM)[None, :]
    k = tl.load(key + at[:, None].to(tl.int64) * key_stride + dim[None, :], mask=filled, other=0.0)
    scores = scores_of(query, k, scale, softcap, CAPPED, PRECISION)
    return tl.where((at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None]), scores, float("-inf"))


@triton.jit(do_not_specialize=["length", "keys"])
def normaliser_kernel(
    query, key, spans, greatest_of, total_of, length, keys, scale, softcap,
    query_head_stride, query_stride, key_head_stride, key_stride,
    GROUPS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of a piece of the keys, ``[P, K, rows]``. Grid: tiles of rows, K, P."""
    row, at, member, first, last = rows_of(tl.program_id(0), spans, length, keys, GROUPS, BLOCK_M)
    kv_head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    place = (kv_head * GROUPS + member)[:, None].to(tl.int64) * query_head_stride + at[:, None].to(
        tl.int64
    ) * query_stride
    q = tl.load(query + place + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
    key += kv_head.to(tl.int64) * key_head_stride
    greatest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    begin = tl.program_id(2) * PIECE
    for start in range(begin, tl.minimum(begin + PIECE, keys), BLOCK_N):
        scores = _masked_scores(
            q, key, key_stride, start, keys, first, last, scale, softcap, CAPPED, PRECISION, DIM, BLOCK_N, BLOCK_D
        )
        higher = tl.maximum(greatest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(greatest - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        greatest = higher
    rows = length * GROUPS
    to = (tl.program_id(2) * tl.num_programs(1) + kv_head) * rows + row
    tl.store(greatest_of + to, greatest, mask=row < rows)
    tl.store(total_of + to, total, mask=row < rows)


@triton.jit(do_not_specialize=["length", "keys"])
def mass_kernel(
    query, key, spans, normaliser, out, length, keys, kv_heads, scale, softcap,
    query_head_stride, query_stride, key_head_stride, key_stride,
    GROUPS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weights of BLOCK_N keys, summed over all rows of all heads. Grid: blocks of keys."""
    start = tl.program_id(0) * BLOCK_N
    dim = tl.arange(0, BLOCK_D)
    mass = tl.zeros([BLOCK_N], tl.float32)
    rows = length * GROUPS
    for kv_head in range(kv_heads):
        for tile in range(tl.cdiv(rows, BLOCK_M)):
            row, at, member, first, last = rows_of(tile, spans, length, keys, GROUPS, BLOCK_M)
            head = (kv_head * GROUPS + member)[:, None].to(tl.int64)
            place = query + head * query_head_stride + at[:, None].to(tl.int64) * query_stride
            q = tl.load(place + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
            scores = _masked_scores(
                q, key + tl.cast(kv_head, tl.int64) * key_head_stride, key_stride, start, keys, first, last, scale, softcap,
                CAPPED, PRECISION, DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            # +inf for rows behind the last one, and for those that see nothing: no weight
            base = tl.load(normaliser + kv_head * rows + row, mask=row < rows, other=float("inf"))
            mass += tl.sum(tl.exp2(scores - base[:, None]), 0)
    at = start + tl.arange(0, BLOCK_N)
    tl.store(out + at, mass, mask=at < keys)


def constants(groups: int, dim: int, dtype: torch.dtype, *, capped: bool) -> dict[str, Any]:
    """The kernels' compile-time arguments: the largest tiles that spill no registers."""
    shared = attention_constants(groups, dim, dim, dtype, capped=capped, sunk=False)
    fixed = {name: shared[name] for name in ("GROUPS", "CAPPED", "PRECISION", "DIM", "BLOCK_D")}
    if dtype == torch.float32:
        rows, columns, stages = (16, 32, 3) if dim <= 128 else (16, 16, 1)
    else:
        rows, columns, stages = (32, 64, 3) if dim <= 128 else (32, 32, 3)
    return {**fixed, "BLOCK_M": rows, "BLOCK_N": columns, "num_stages": stages}


def question_scores(query: Tensor, key: Tensor, spans: Tensor, scoring: Scoring) -> Tensor:
    """See :func:`ragkv.kernels.question_scores`."""
    query, key, spans = in_rows(query), in_rows(key), spans.contiguous()
    heads, length, dim = query.shape
    kv_heads, keys, _ = key.shape
    out = torch.zeros(keys, dtype=torch.float32, device=key.device)
    if not length or not keys:
        return out
    fixed = constants(heads // kv_heads, dim, query.dtype, capped=scoring.softcap is not None)
    numbers = in_log2(scoring)
    strides = (*query.stride()[:2], *key.stride()[:2])
    rows, pieces = length * heads // kv_heads, triton.cdiv(keys, PIECE)
    greatest = torch.empty(pieces, kv_heads, rows, dtype=torch.float32, device=key.device)
    total = torch.empty_like(greatest)
    grid = (triton.cdiv(rows, fixed["BLOCK_M"]), kv_heads, pieces)
    launch(
        *(normaliser_kernel, grid, key.device),
        *(query, key, spans, greatest, total, length, keys, *numbers, *strides),
        **fixed,
        PIECE=PIECE,
    )
    normaliser = _normaliser(greatest, total, scoring.sinks, length)
    launch(
        *(mass_kernel, (triton.cdiv(keys, fixed["BLOCK_N"]),), key.device),
        *(query, key, spans, normaliser, out, length, keys, kv_heads, *numbers, *strides),
        **fixed,
    )
    return out


def _normaliser(greatest: Tensor, total: Tensor, sinks: Tensor | None, length: int) -> Tensor:
    """log2 of every row's sum of exponentials ``[K, rows]``, over all pieces and the sinks; +inf where there is nothing."""
    parts = greatest + total.log2()
    if sinks is not None:
        own = (sinks.float() * _LOG2E).view(1, greatest.shape[1], 1, -1).expand(-1, -1, length, -1)
        parts = torch.cat([parts, own.flatten(2)])
    whole = torch.logsumexp(parts / _LOG2E, 0) * _LOG2E
    return torch.where(whole == -torch.inf, torch.inf, whole).contiguous()
