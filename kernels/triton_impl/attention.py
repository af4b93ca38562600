"""Attention of scattered queries, each over its own run of keys.

H query heads, K kv heads, S queries, N keys, D head_dim, P parts of the keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ragkv.kernels.dispatch import interpreting
from ragkv.kernels.scoring import Scoring
from ragkv.kernels.triton_impl.attention_kernel import attention_kernel, combine_kernel
from ragkv.kernels.triton_impl.launch import block, heads_at_once, in_rows, launch

_LOG2E = 1.4426950408889634
_PART = 512  # keys that are worth a program of their own
_COMBINED = 4096  # numbers of a row's parts that one program reads at once
_CACHED = 32 << 20  # bytes of keys and values that stay in a GPU's cache
_SMALL = 64  # rows of a tile, up to which a multiprocessor's registers and shared memory hold two programs


def tuning(dim: int, dtype: torch.dtype, capability: tuple[int, int], asked: int) -> dict[str, int]:
    """Tile sizes, warps and stages: the largest tiles that spill no registers and fit into shared memory.

    Args:
        dim: the wider of D and Dv.
        dtype: of query, key and value.
        capability: of the GPU.
        asked: S H / K, rows of a kv head. Where they are few, a large tile is mostly multiplied for nothing: one token of 4 heads
            to a kv head fills 4 rows of 128, and would wait for products instead of for keys.
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
    if asked < rows:
        rows, warps = block(asked, 16), 4  # 16 is the least that is multiplied at once
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": stages}


def constants(
    groups: int,
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    *,
    capped: bool,
    sunk: bool,
    split: bool = False,
    kept: bool = False,
) -> dict[str, Any]:
    """The kernel's compile-time arguments, tile sizes apart."""
    # fp32 as three tf32 products is nearly exact and uses the matrix units; the widest heads do not fit into registers so.
    exact = "ieee" if max(dim, value_dim) > 128 else "tf32x3"
    return {
        "GROUPS": groups,
        "CAPPED": capped,
        "SUNK": sunk,
        "SPLIT": split,
        "KEPT": kept,
        "PRECISION": "widened" if interpreting() else exact if dtype == torch.float32 else "tf32",
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": block(dim, 16),
        "BLOCK_V": block(value_dim, 16),
    }


def capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; that of an A100 under the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def processors(device: torch.device) -> int:
    """How many programs of large tiles run side by side: one on each multiprocessor; one under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def parts_of(tiles: int, kv_heads: int, keys: int, processors: int, window: int | None = None) -> int:
    """Into how many parts the keys are split, so that few queries keep all processors busy.

    A single tile sees as many keys in every head, and so do tiles with a window: processors are filled once. Others do not: there
    are more than two programs a processor, of which the short ones fill the gaps that the long ones leave.

    Args:
        tiles: of rows.
        kv_heads: K.
        keys: N.
        processors: how many programs run side by side.
        window: most keys that a query sees, if there is one.
    """
    programs = tiles * kv_heads
    alike = tiles == 1 or (window is not None and window < keys)
    filled = processors // programs if alike else 2 * processors // programs + 1
    return max(1, min(filled, keys // _PART))


def in_log2(scoring: Scoring) -> tuple[float, float]:
    """Scale and cap as :func:`scores_of` takes them."""
    if scoring.softcap is None:
        return scoring.scale * _LOG2E, 1.0
    return scoring.scale, scoring.softcap


def selective_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    scoring: Scoring,
    normaliser: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """See :func:`ragkv.kernels.selective_attention`.

    ``normaliser`` ``[S, H]`` fp32 is written: log2 of each row's sum of exponentials.
    """
    query, key, value, spans = in_rows(query), in_rows(key), in_rows(value), spans.contiguous()
    heads, length, dim = query.shape
    kv_heads, keys, value_dim = value.shape
    out = query.new_empty(length, heads, value_dim)
    if not out.numel():
        return out
    rows = length * heads // kv_heads
    sizes = tuning(max(dim, value_dim), query.dtype, capability(query.device), rows)
    tiles = triton.cdiv(rows, sizes["BLOCK_M"])
    places = processors(query.device) * (2 if sizes["BLOCK_M"] <= _SMALL else 1)
    parts = parts_of(tiles, kv_heads, keys, places, window)
    cached = _CACHED // max(1, keys * (dim + value_dim) * key.element_size())
    sinks, split, kept = scoring.sinks, parts > 1, normaliser is not None
    fixed = constants(
        *(heads // kv_heads, dim, value_dim, query.dtype),
        capped=scoring.softcap is not None,
        sunk=sinks is not None,
        split=split,
        kept=kept,
    )
    normaliser = out if normaliser is None else normaliser
    partial, greatest, total = _workspace(out, parts) if split else (out, normaliser, out)
    launch(
        *(attention_kernel, (kv_heads * tiles * parts,), out.device),
        *(query, key, value, partial, greatest, total, spans, spans if sinks is None else sinks.contiguous()),
        *(length, keys, tiles, parts, kv_heads, heads_at_once(kv_heads, max(1, cached)), *in_log2(scoring)),
        *(*query.stride()[:2], *key.stride()[:2], *value.stride()[:2]),
        **fixed,
        **sizes,
    )
    if split:
        launch(
            *(combine_kernel, (length * heads,), out.device),
            *(partial, greatest, total, out, normaliser, length * heads, parts),
            KEPT=kept,
            VALUE_DIM=value_dim,
            BLOCK_V=fixed["BLOCK_V"],
            **combining(parts, fixed["BLOCK_V"]),
        )
    return out


def combining(parts: int, width: int) -> dict[str, int]:
    """How many parts of a row are read at once, and by how many warps: so many that a thread reads 32 numbers."""
    at_once = min(block(parts), max(1, _COMBINED // width))
    return {"AT_ONCE": at_once, "num_warps": max(1, at_once * width // 1024)}


def _workspace(out: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room in fp32 for the outputs ``[P, S, H, Dv]``, maxima and sums ``[P, S, H]`` of all parts."""
    partial = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
    greatest = torch.empty(partial.shape[:3], dtype=torch.float32, device=out.device)
    return partial, greatest, torch.empty_like(greatest)
