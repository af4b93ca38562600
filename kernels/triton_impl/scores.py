"""How much attention a few queries pay to every key, once attention has said what each query's weights add up to.

H query heads, K kv heads, S queries, N keys, D head_dim. The matrix of weights is never in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragkv.kernels.scoring import Scoring
from ragkv.kernels.triton_impl.attention import constants as attention_constants
from ragkv.kernels.triton_impl.attention import in_log2, selective_attention
from ragkv.kernels.triton_impl.attention_kernel import rows_of, scores_of
from ragkv.kernels.triton_impl.launch import in_rows, launch


@triton.jit(do_not_specialize=["length", "keys"])
def scores_kernel(
    query, key, spans, weights, normaliser, out, length, keys, scale, softcap,
    query_head_stride, query_stride, key_head_stride, key_stride,
    GROUPS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What BLOCK_N keys get of all rows of one kv head, ``[K, N]``; keys are read once. Grid: blocks of keys, K."""
    kv_head = tl.program_id(1)
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    filled = (at < keys)[:, None] & (dim < DIM)[None, :]
    key += kv_head.to(tl.int64) * key_head_stride
    k = tl.load(key + at[:, None].to(tl.int64) * key_stride + dim[None, :], mask=filled, other=0.0)
    sums = tl.zeros([BLOCK_N], tl.float32)
    rows, heads = length * GROUPS, tl.num_programs(1) * GROUPS
    for tile in range(tl.cdiv(rows, BLOCK_M)):
        row, asked, member, first, last = rows_of(tile, spans, length, keys, GROUPS, BLOCK_M)
        head, held = kv_head * GROUPS + member, row < rows
        place = head[:, None].to(tl.int64) * query_head_stride + asked[:, None].to(tl.int64) * query_stride
        q = tl.load(query + place + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
        scores = scores_of(q, k, scale, softcap, CAPPED, PRECISION)
        scores = tl.where((at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None]), scores, float("-inf"))
        base = tl.load(normaliser + asked * heads + head)
        base = tl.where(base == float("-inf"), 0.0, base)  # of a row that sees nothing
        weight = tl.load(weights + asked, mask=held, other=0.0)
        sums += tl.sum(weight[:, None] * tl.exp2(scores - base[:, None]), 0)
    tl.store(out + kv_head.to(tl.int64) * keys + at, sums, mask=at < keys)


def constants(groups: int, dim: int, dtype: torch.dtype, *, capped: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments: the largest tiles that spill no registers."""
    shared = attention_constants(groups, dim, dim, dtype, capped=capped, sunk=False)
    fixed = {name: shared[name] for name in ("GROUPS", "CAPPED", "PRECISION", "DIM", "BLOCK_D")}
    if dtype == torch.float32:
        rows, columns, stages = (16, 32, 3) if dim <= 128 else (16, 16, 1)
    else:
        rows, columns, stages = (32, 64, 3) if dim <= 128 else (32, 32, 3)
    return {**fixed, "BLOCK_M": rows, "BLOCK_N": columns, "num_stages": stages}


def scored_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Tensor, weights: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """See :func:`ragkv.kernels.scored_attention`."""
    query, key, spans, weights = in_rows(query), in_rows(key), spans.contiguous(), weights.contiguous()
    heads, length, dim = query.shape
    kv_heads, keys, _ = key.shape
    normaliser = torch.empty(length, heads, dtype=torch.float32, device=key.device)
    out = selective_attention(query, key, value, spans, scoring, normaliser)
    if not length or not keys:
        return out, torch.zeros(keys, dtype=torch.float32, device=key.device)
    fixed = constants(heads // kv_heads, dim, query.dtype, capped=scoring.softcap is not None)
    sums = torch.empty(kv_heads, keys, dtype=torch.float32, device=key.device)
    launch(
        *(scores_kernel, (triton.cdiv(keys, fixed["BLOCK_N"]), kv_heads), key.device),
        *(query, key, spans, weights, normaliser, sums, length, keys, *in_log2(scoring)),
        *(*query.stride()[:2], *key.stride()[:2]),
        **fixed,
    )
    return out, sums.sum(0) / heads
