"""Stored keys and values to their slots in one pass: gather, decode, rotate, write.

H kv heads, T tokens, D head_dim, R rotated dimensions, P tokens of a pool's block, G groups of a line, E numbers of a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ragkv.kernels.stored import Piece
from ragkv.kernels.triton_impl.decoding import from_e4m3, per_number, unpacked
from ragkv.kernels.triton_impl.launch import LANGUAGE_DTYPES, aligned, block, heads_at_once, in_rows

_BLOCK = 32  # tokens of a tile
_GROUPS = (32, 64, 128)  # sizes of groups that a kernel is compiled for
_MOST_PIECES = 65535  # of a launch: CUDA's limit on the grid's third axis

# A launch reads a table [pieces, 16] int64: lengths, addresses, and strides in numbers.
_FIELDS: tl.constexpr = tl.constexpr(16)


@triton.jit
def _plain(
    source,
    head,
    start,
    dim,
    stop,
    DIM: tl.constexpr,
    CODEC: tl.constexpr,
    SIDE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Raw or e4m3 numbers: dimensions ``dim`` below ``stop`` of tokens ``start .. start + BLOCK - 1``, fp32 ``[BLOCK, dims]``."""
    number, slots, scale, _, tokens, head_stride, line_stride, block_stride, _, _, _ = source
    token = start + tl.arange(0, BLOCK)
    inside = token < tokens
    if PAGE > 0:
        slot = tl.load(slots + token, mask=inside, other=0)
        at = (slot // PAGE) * block_stride + (slot % PAGE) * line_stride
    else:
        at = token * line_stride
    at = number + head * head_stride + at[:, None] + dim[None, :]
    read = tl.load(at, mask=inside[:, None] & (dim < stop)[None, :], other=0.0)
    if CODEC == "raw":
        tile = read.to(tl.float32)
    elif SIDE == "k":
        tile = from_e4m3(read) * tl.load(scale + head * DIM + dim, mask=dim < stop, other=0.0)[None, :]
    else:
        tile = from_e4m3(read) * tl.load(scale + head * tokens + token, mask=inside, other=0.0)[:, None]
    return tile


@triton.jit
def _grouped(
    source,
    head,
    start,
    dim,
    FIRST: tl.constexpr,
    STOP: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    INT4: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same of integers with a step and a lowest number a group. K's lines are channels: they are read along the tokens."""
    number, _, scale, low, tokens, head_stride, line_stride, _, groups, group, length = source
    number += head * head_stride
    if SIDE == "k":
        WHOLE: tl.constexpr = GROUP > 0 and (GROUP % BLOCK == 0 or BLOCK % GROUP == 0)
        line = tl.minimum(dim, STOP - 1)[:, None].to(tl.int64)
        integer = unpacked(number + line * line_stride, start, length, BLOCK, INT4, True)
        line = (head * DIM + line) * groups
        step = per_number(scale + line, start, tokens, group, BLOCK, GROUP, WHOLE)
        tile = tl.trans(integer * step + per_number(low + line, start, tokens, group, BLOCK, GROUP, WHOLE))
    else:
        ALONG: tl.constexpr = GROUP > 0 and FIRST % GROUP == 0 and (GROUP % WIDTH == 0 or WIDTH % GROUP == 0)
        line = tl.minimum(start + tl.arange(0, BLOCK), tokens - 1)[:, None]
        integer = unpacked(number + line * line_stride, FIRST, STOP, WIDTH, INT4, FIRST % 2 == 0 and WIDTH > 1)
        line = (head * tokens + line) * groups
        step = per_number(scale + line, FIRST, STOP, group, WIDTH, GROUP, ALONG)
        tile = integer * step + per_number(low + line, FIRST, STOP, group, WIDTH, GROUP, ALONG)
    return tile


@triton.jit
def _tile(
    source,
    head,
    start,
    FIRST: tl.constexpr,
    STOP: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    CODEC: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dimensions FIRST .. STOP - 1 of BLOCK tokens as fp32 ``[BLOCK, WIDTH]``."""
    dim = FIRST + tl.arange(0, WIDTH)
    if CODEC == "int8" or CODEC == "int4":
        tile = _grouped(source, head, start, dim, FIRST, STOP, WIDTH, DIM, CODEC == "int4", SIDE, GROUP, BLOCK)
    else:
        tile = _plain(source, head, start, dim, STOP, DIM, CODEC, SIDE, PAGE, BLOCK)
    return tile


@triton.jit
def place_kernel(
    table,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CODEC: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    NUMBER: tl.constexpr,
    SCALE: tl.constexpr,
    LOW: tl.constexpr,
    OUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens of HEADS heads of one piece. Grid: H / HEADS, blocks of tokens, pieces."""
    row = table + tl.program_id(2).to(tl.int64) * _FIELDS
    tokens = tl.load(row)
    start = tl.program_id(1).to(tl.int64) * BLOCK
    if start >= tokens:
        return
    number = tl.load(row + 1).to(tl.pointer_type(NUMBER))
    slots = tl.load(row + 2).to(tl.pointer_type(tl.int64))
    scale = tl.load(row + 3).to(tl.pointer_type(SCALE))
    low = tl.load(row + 4).to(tl.pointer_type(LOW))
    cosines = tl.load(row + 5)
    sines = tl.load(row + 6)
    out = tl.load(row + 7).to(tl.pointer_type(OUT))
    head_stride = tl.load(row + 8)
    line_stride = tl.load(row + 9)
    block_stride = tl.load(row + 10)
    out_head_stride = tl.load(row + 11)
    out_token_stride = tl.load(row + 12)
    if ALIGNED:  # rows begin at multiples of 16 bytes
        number = tl.multiple_of(number, 16)
        out = tl.multiple_of(out, 16)
        head_stride = tl.multiple_of(head_stride, 128 // NUMBER.primitive_bitwidth)
        line_stride = tl.multiple_of(line_stride, 128 // NUMBER.primitive_bitwidth)
        block_stride = tl.multiple_of(block_stride, 128 // NUMBER.primitive_bitwidth)
        out_head_stride = tl.multiple_of(out_head_stride, 128 // OUT.primitive_bitwidth)
        out_token_stride = tl.multiple_of(out_token_stride, 128 // OUT.primitive_bitwidth)
    groups = tl.load(row + 13)
    group = tl.load(row + 14)
    length = groups * group  # of a line with what fills it up, so that whole groups can be read
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    source = (number, slots, scale, low, tokens, head_stride, line_stride, block_stride, groups, group, length)
    token = start + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None]
    out += token[:, None] * out_token_stride
    first_head = tl.program_id(0).to(tl.int64) * HEADS
    if cosines == 0:
        dim = tl.arange(0, DIM_BLOCK)
        for number_of_head in range(HEADS):
            head = first_head + number_of_head
            tile = _tile(source, head, start, 0, DIM, DIM_BLOCK, DIM, CODEC, SIDE, GROUP, PAGE, BLOCK)
            tl.store(out + head * out_head_stride + dim[None, :], tile.to(OUT), mask=inside & (dim < DIM)[None, :])
    elif HALF > 0:
        pair = tl.arange(0, HALF_BLOCK)
        turned = inside & (pair < HALF)[None, :]
        angle = token[:, None] * HALF + pair[None, :]
        cos = tl.load(tl.multiple_of(cosines.to(tl.pointer_type(tl.float32)), 16) + angle, mask=turned, other=0.0)
        sin = tl.load(tl.multiple_of(sines.to(tl.pointer_type(tl.float32)), 16) + angle, mask=turned, other=0.0)
        for number_of_head in range(HEADS):
            head = first_head + number_of_head
            to = out + head * out_head_stride
            if INTERLEAVED:
                both = _tile(source, head, start, 0, 2 * HALF, 2 * HALF_BLOCK, DIM, CODEC, SIDE, GROUP, PAGE, BLOCK)
                x, y = tl.split(tl.reshape(both, (BLOCK, HALF_BLOCK, 2)))
                both = tl.reshape(tl.join(x * cos - y * sin, y * cos + x * sin), (BLOCK, 2 * HALF_BLOCK))
                dim = tl.arange(0, 2 * HALF_BLOCK)
                tl.store(to + dim[None, :], both.to(OUT), mask=inside & (dim < 2 * HALF)[None, :])
            else:
                x = _tile(source, head, start, 0, HALF, HALF_BLOCK, DIM, CODEC, SIDE, GROUP, PAGE, BLOCK)
                y = _tile(source, head, start, HALF, 2 * HALF, HALF_BLOCK, DIM, CODEC, SIDE, GROUP, PAGE, BLOCK)
                tl.store(to + pair[None, :], (x * cos - y * sin).to(OUT), mask=turned)
                tl.store(to + HALF + pair[None, :], (y * cos + x * sin).to(OUT), mask=turned)
            if REST_BLOCK > 0:
                rest = 2 * HALF + tl.arange(0, REST_BLOCK)
                tile = _tile(source, head, start, 2 * HALF, DIM, REST_BLOCK, DIM, CODEC, SIDE, GROUP, PAGE, BLOCK)
                tl.store(to + rest[None, :], tile.to(OUT), mask=inside & (rest < DIM)[None, :])


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
    place_kernel[(kind.heads // fixed["HEADS"], blocks, len(rows))](table, **fixed)


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
