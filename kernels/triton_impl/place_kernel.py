"""The kernel that places: a tile of stored numbers is gathered, decoded, turned and written.

D head_dim, P tokens of a pool's block, G groups of a line, E numbers of a group.
"""

import triton
import triton.language as tl

from ragkv.kernels.triton_impl.decoding import from_e4m3, per_number, unpacked

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
        EVEN: tl.constexpr = FIRST % 2 == 0 and WIDTH > 1
        integer = unpacked(number + line * line_stride, FIRST, STOP + STOP % 2 * EVEN, WIDTH, INT4, EVEN)
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
    READ: tl.constexpr,
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
        number = tl.multiple_of(number, READ)
        out = tl.multiple_of(out, 16)
        head_stride = tl.multiple_of(head_stride, 8 * READ // NUMBER.primitive_bitwidth)
        line_stride = tl.multiple_of(line_stride, 8 * READ // NUMBER.primitive_bitwidth)
        block_stride = tl.multiple_of(block_stride, 8 * READ // NUMBER.primitive_bitwidth)
        out_head_stride = tl.multiple_of(out_head_stride, 128 // OUT.primitive_bitwidth)
        out_token_stride = tl.multiple_of(out_token_stride, 128 // OUT.primitive_bitwidth)
    groups = tl.load(row + 13)
    group = tl.load(row + 14)
    if start >= tokens:  # asked once all of the row is on its way
        return
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
