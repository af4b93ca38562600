"""Stored keys and values to their slots in one pass: gather, decode, rotate, write.

H kv heads, T tokens, D head_dim, R rotated dimensions, P tokens of a pool's block, G groups of a line, E numbers of a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ragkv.kernels.stored import Piece, Stored
from ragkv.kernels.triton_impl.launch import LANGUAGE_DTYPES, aligned, block, heads_at_once, in_rows, launch
from ragkv.kernels.triton_impl.place_kernel import place_kernel
from ragkv.kernels.upload import sent

_BLOCK = 32  # tokens of a tile
# Heads that are read before the first is used, and how many numbers of each a thread takes: so that a processor has as many bytes
# under way as its registers allow (benchmarks/gpu/inspect_kernels.py).
_SHARES = {
    "raw": (2, 32),
    "int8 k": (4, 16),
    "int8 v": (4, 16),
    "int4 k": (4, 16),
    "int4 v": (4, 32),
    "fp8 k": (2, 16),
    "fp8 v": (4, 32),
}
_GROUPS = (32, 64, 128)  # sizes of groups that a kernel is compiled for
_MOST_PIECES = 65535  # of a launch: CUDA's limit on the grid's third axis


class Held(NamedTuple):
    """What the parts of one launch that are read have in common."""

    dim: int
    codec: str
    side: str
    group: int
    page: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    dense: bool
    heads: int


class Kind(NamedTuple):
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

    @classmethod
    def of(cls, held: Held, out: torch.dtype, dense: bool, half: int, interleaved: bool) -> Kind:
        """What is read, and where it goes; whether rows begin at multiples of 16 bytes there."""
        dim, codec, side, group, page, dtypes, read_dense, heads = held
        return cls(dim, half, interleaved, codec, side, group, page, (*dtypes, out), read_dense and dense, heads)


def place_pieces(pieces: Sequence[Piece]) -> None:
    """See :func:`ragkv.kernels.place_pieces`; one launch for the pieces of a kind."""
    pieces = [piece for piece in pieces if all(piece.stored.shape)]
    turns = {(piece.cos.shape[1], piece.interleaved) for piece in pieces if piece.cos is not None}
    plain = turns.pop() if len(turns) == 1 else (0, False)  # what turns and what does not then share a launch
    kinds: dict[Kind, list[list[int]]] = defaultdict(list)
    held: list[Tensor] = []  # dense copies live until the launch
    for piece in pieces:
        half, interleaved = plain if piece.cos is None else (piece.cos.shape[1], piece.interleaved)
        kind, row = _described(piece, half, interleaved, held)
        kinds[kind].append(row)
    for kind, rows in kinds.items():
        table = sent(torch.tensor(rows, dtype=torch.int64, device="cpu"), pieces[0].out.device)
        launch_kind(kind, table, max(row[0] for row in rows))


def launch_kind(kind: Kind, table: Tensor, longest: int) -> None:
    """One launch for the pieces of a kind, or a few where they are very many.

    Args:
        kind: what they have in common.
        table: ``[pieces, 16]`` int64 on the device, as :mod:`ragkv.kernels.triton_impl.place_kernel` reads it.
        longest: tokens of the longest piece.
    """
    fixed = constants(*kind)
    blocks = triton.cdiv(longest, fixed["BLOCK"])
    for first in range(0, len(table), _MOST_PIECES):
        rows = table[first : first + _MOST_PIECES]
        launch(place_kernel, (kind.heads // fixed["HEADS"], blocks, len(rows)), rows.device, rows, **fixed)


def _described(piece: Piece, half: int, interleaved: bool, held: list[Tensor]) -> tuple[Kind, list[int]]:
    """What a piece has in common with others, and its row of the table. This is Python's share of a placement: it is kept short."""
    stored, out = piece.stored, piece.out
    if stored.numbers.stride(-1) != 1:
        stored = replace(stored, numbers=in_rows(stored.numbers))
        held.append(stored.numbers)
    what, row = described(stored, held)
    to, (head_stride, token_stride, _) = out.data_ptr(), out.stride()
    row[0], row[2] = stored.shape[1], _dense(stored.slots, held)
    row[5:8] = _dense(piece.cos, held), _dense(piece.sin, held), to
    row[11:13] = head_stride, token_stride
    dense = aligned(to, head_stride, token_stride, itemsize=out.itemsize)
    return Kind.of(what, out.dtype, dense, half, interleaved), row


def described(stored: Stored, held: list[Tensor]) -> tuple[Held, list[int]]:
    """What stored numbers, dense in their last dimension, have in common with others, and what the table says of them.

    Args:
        stored: K or V of one layer.
        held: is given the copies of scales that must live until the launch.

    Returns:
        The kind and a row of the table: zeros where it hangs on what is placed, and to where.
    """
    numbers, scale, low, group = stored.numbers, stored.scale, stored.low, stored.group
    paged = numbers.dim() == 4
    block_stride, head_stride, line_stride = numbers.stride()[:3] if paged else (0, *numbers.stride()[:2])
    start = numbers.data_ptr()
    kind = Held(
        *(stored.shape[2], stored.codec, stored.side, group if group in _GROUPS else 0),
        page=numbers.shape[2] if paged else 0,
        dtypes=(numbers.dtype, _dtype(scale), _dtype(low)),
        dense=aligned(start, block_stride, head_stride, line_stride, itemsize=numbers.itemsize),
        heads=stored.shape[0],
    )
    row = [0, start, 0, _dense(scale, held), _dense(low, held), 0, 0, 0, head_stride, line_stride, block_stride, 0, 0]
    return kind, [*row, 0 if scale is None else scale.shape[-1], group, 0]


def _dense(part: Tensor | None, held: list[Tensor]) -> int:
    """The address of a part whose numbers lie one after the other; 0 where there is none."""
    if part is None:
        return 0
    if not part.is_contiguous():
        part = part.contiguous()
        held.append(part)
    return part.data_ptr()


@cache
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
    """The kernel's compile-time arguments, and how many warps a program has.

    Args:
        dim: D.
        half: R / 2; 0 where nothing turns.
        interleaved: which dimensions form a pair.
        codec: of the numbers.
        side: K or V.
        group: E, or 0 for odd sizes: chunks that are no multiple of a group share one compiled kernel that is told E when it runs.
        page: P, or 0.
        dtypes: of numbers, scales, lowest numbers and output.
        dense: rows begin at multiples of 16 bytes.
        heads: H.
    """
    at_once, share = _SHARES["raw" if codec == "raw" else f"{codec} {side}"]
    lines = side == "k" and codec in (
        "int8",
        "int4",
    )  # they run along the tokens, and are turned around in shared memory
    # Else a thread reads the numbers that it writes 16 bytes of, and nothing moves between threads.
    read = 16 if codec == "raw" or lines else 16 // dtypes[3].itemsize // (2 if codec == "int4" else 1)
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
        "READ": read,
        "HEADS": heads_at_once(heads),
        "AT_ONCE": heads_at_once(heads_at_once(heads), at_once),
        "BLOCK": _BLOCK,
        "DIM_BLOCK": block(dim),
        "HALF_BLOCK": block(half) if half else 0,
        "REST_BLOCK": block(dim - 2 * half) if dim > 2 * half else 0,
        "num_warps": min(max(4, _BLOCK * block(dim) // (32 * share)), 16),
    }


def _dtype(part: Tensor | None) -> torch.dtype:
    return torch.float32 if part is None else part.dtype
