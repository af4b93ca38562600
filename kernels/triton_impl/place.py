"""Stored keys and values to their slots in one pass: gather, decode, rotate, write.

H kv heads, T tokens, D head_dim, R rotated dimensions, P tokens of a pool's block, G groups of a line, E numbers of a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ragkv.kernels.stored import Piece
from ragkv.kernels.triton_impl.launch import LANGUAGE_DTYPES, aligned, block, heads_at_once, in_rows, launch
from ragkv.kernels.triton_impl.place_kernel import place_kernel

_BLOCK = 32  # tokens of a tile
_GROUPS = (32, 64, 128)  # sizes of groups that a kernel is compiled for
_MOST_PIECES = 65535  # of a launch: CUDA's limit on the grid's third axis


class _Kind(NamedTuple):
    """What the pieces of one launch have in common; see :func:`constants`."""

    dim: int
    half: int
    interleaved: bool
    codec: str
    side: str
    group: int
    page: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]
    dense: bool
    heads: int


def place_pieces(pieces: Sequence[Piece]) -> None:
    """See :func:`ragkv.kernels.place_pieces`; one launch for the pieces of a kind."""
    pieces = [piece for piece in pieces if all(piece.stored.shape)]
    turns = {(piece.cos.shape[1], piece.interleaved) for piece in pieces if piece.cos is not None}
    plain = turns.pop() if len(turns) == 1 else (0, False)  # what turns and what does not then share a launch
    kinds: dict[_Kind, list[list[int]]] = defaultdict(list)
    held: list[Tensor] = []  # dense copies live until the launch
    for piece in pieces:
        half, interleaved = plain if piece.cos is None else (piece.cos.shape[1], piece.interleaved)
        kind, row = _described(piece, half, interleaved, held)
        kinds[kind].append(row)
    for kind, rows in kinds.items():
        for first in range(0, len(rows), _MOST_PIECES):
            _launch(kind, rows[first : first + _MOST_PIECES], pieces[0].out)


def _launch(kind: _Kind, rows: list[list[int]], out: Tensor) -> None:
    table = torch.tensor(rows, dtype=torch.int64)
    if out.is_cuda:
        table = table.pin_memory().to(out.device, non_blocking=True)
    blocks = triton.cdiv(max(row[0] for row in rows), _BLOCK)
    fixed = constants(**kind._asdict())
    launch(place_kernel, (kind.heads // fixed["HEADS"], blocks, len(rows)), out.device, table, **fixed)


def _described(piece: Piece, half: int, interleaved: bool, held: list[Tensor]) -> tuple[_Kind, list[int]]:
    """What a piece has in common with others, and its row of the table. This is Python's share of a placement: it is kept short."""
    stored, out = piece.stored, piece.out
    numbers, slots, scale, low = stored.numbers, stored.slots, stored.scale, stored.low
    if numbers.stride(-1) != 1:
        numbers = in_rows(numbers)
        held.append(numbers)
    parts = [_dense(part, held) for part in (slots, scale, low, piece.cos, piece.sin)]
    block_stride, head_stride, line_stride = numbers.stride()[:3] if slots is not None else (0, *numbers.stride()[:2])
    start, to, (out_head_stride, out_token_stride, _) = numbers.data_ptr(), out.data_ptr(), out.stride()
    heads, tokens, dim = stored.shape
    group = stored.group
    kind = _Kind(
        *(dim, half, interleaved, stored.codec, stored.side, group if group in _GROUPS else 0),
        page=0 if slots is None else numbers.shape[2],
        dtypes=(numbers.dtype, _dtype(scale), _dtype(low), out.dtype),
        dense=aligned(start, block_stride, head_stride, line_stride, itemsize=numbers.itemsize)
        and aligned(to, out_head_stride, out_token_stride, itemsize=out.itemsize),
        heads=heads,
    )
    row = [tokens, start, *parts, to, head_stride, line_stride, block_stride, out_head_stride, out_token_stride]
    return kind, [*row, 0 if scale is None else scale.shape[-1], group, 0]


def _dense(part: Tensor | None, held: list[Tensor]) -> int:
    """The address of a part whose numbers lie one after the other; 0 where there is none."""
    if part is None:
        return 0
    if not part.is_contiguous():
        part = part.contiguous()
        held.append(part)
    return part.data_ptr()


def constants(
    dim: int,
    half: int,
    interleaved: bool,
    codec: str,
    side: str,
    group: int,
    page: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
    dense: bool,
    heads: int,
) -> dict[str, Any]:
    """The kernel's compile-time arguments.

    Args:
        dim: D.
        half: R / 2; 0 where nothing turns.
        interleaved: which dimensions form a pair.
        codec: of the numbers.
        side: K or V.
        group: E, or 0 for odd sizes: chunks shorter than a group share one compiled kernel that is told E when it runs.
        page: P, or 0.
        dtypes: of numbers, scales, lowest numbers and output.
        dense: rows begin at multiples of 16 bytes.
        heads: H.
    """
    names = zip(("NUMBER", "SCALE", "LOW", "OUT"), dtypes, strict=True)
    return {
        "DIM": dim,
        "HALF": half,
        "INTERLEAVED": interleaved,
        "CODEC": codec,
        "SIDE": "v" if codec == "raw" else side,
        "GROUP": group,
        "PAGE": page,
        **{name: LANGUAGE_DTYPES[dtype] for name, dtype in names},
        "ALIGNED": dense,
        "HEADS": heads_at_once(heads),
        "BLOCK": _BLOCK,
        "DIM_BLOCK": block(dim),
        "HALF_BLOCK": block(half) if half else 0,
        "REST_BLOCK": block(dim - 2 * half) if dim > 2 * half else 0,
    }


def _dtype(part: Tensor | None) -> torch.dtype:
    return torch.float32 if part is None else part.dtype
