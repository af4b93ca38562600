"""The kernel that places: a tile of stored numbers is gathered, decoded, turned and written.

D head_dim, P tokens of a pool's block, G groups of a line, E numbers of a group.
"""

import triton
import triton.language as tl

from ragkv.kernels.triton_impl.decoding import from_e4m3, per_number, read_line, read_scale, unpacked

# A launch reads a table [pieces, 16] int64: lengths, addresses, and strides in numbers.
_FIELDS: tl.constexpr = tl.constexpr(16)


@triton.jit
def _read(
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
    """Dimensions FIRST .. STOP - 1 of BLOCK tokens as they are stored, and scale and lowest number of each group, if any."""
    number, slots, scale, low, tokens, head_stride, line_stride, block_stride, groups, group, length = source
    number += head * head_stride
    dim = FIRST + tl.arange(0, WIDTH)
    token = start + tl.arange(0, BLOCK)
    inside = token < tokens
    step, lowest = 1.0, 0.0
    if (CODEC == "int8" or CODEC == "int4") and SIDE == "k":  # a line is a channel
        WHOLE: tl.constexpr = GROUP > 0 and (GROUP % BLOCK == 0 or BLOCK % GROUP == 0)
        line = tl.minimum(dim, STOP - 1)[:, None].to(tl.int64)
        read = read_line(number + line * line_stride, start, length, BLOCK, CODEC == "int4", CODEC == "int4")
        line = (head * DIM + line) * groups
        step = read_scale(scale + line, start, tokens, group, BLOCK, GROUP, WHOLE)
        lowest = read_scale(low + line, start, tokens, group, BLOCK, GROUP, WHOLE)
    elif CODEC == "int8" or CODEC == "int4":
        ALONG: tl.constexpr = GROUP > 0 and FIRST % GROUP == 0 and (GROUP % WIDTH == 0 or WIDTH % GROUP == 0)
        PAIRS: tl.constexpr = CODEC == "int4" and FIRST % 2 == 0 and WIDTH > 1
        line = tl.minimum(token, tokens - 1)[:, None]
        read = read_line(number + line * line_stride, FIRST, STOP + STOP % 2 * PAIRS, WIDTH, PAIRS, CODEC == "int4")
        line = (head * tokens + line) * groups
        step = read_scale(scale + line, FIRST, STOP, group, WIDTH, GROUP, ALONG)
        lowest = read_scale(low + line, FIRST, STOP, group, WIDTH, GROUP, ALONG)
    else:
        if PAGE > 0:
            slot = tl.load(slots + token, mask=inside, other=0)
            at = (slot // PAGE) * block_stride + (slot % PAGE) * line_stride
        else:
            at = token * line_stride
        read = tl.load(number + at[:, None] + dim[None, :], mask=inside[:, None] & (dim < STOP)[None, :], other=0.0)
        if CODEC == "fp8" and SIDE == "k":
            step = tl.load(scale + head * DIM + dim, mask=dim < STOP, other=0.0)[None, :]
        elif CODEC == "fp8":
            step = tl.load(scale + head * tokens + token, mask=inside, other=0.0)[:, None]
    return read, step, lowest


@triton.jit
def _read_heads(
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
    AT_ONCE: tl.constexpr,
):
    """The same of AT_ONCE heads."""
    tiles = ()
    for number in tl.static_range(AT_ONCE):
        tiles += (_read(source, head + number, start, FIRST, STOP, WIDTH, DIM, CODEC, SIDE, GROUP, PAGE, BLOCK),)
    return tiles


@triton.jit
def _decoded(
    read,
    start,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    CODEC: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What :func:`_read` read as fp32 ``[BLOCK, WIDTH]``."""
    numbers, step, lowest = read
    if CODEC == "fp8":
        tile = from_e4m3(numbers) * step
    elif CODEC == "raw":
        tile = numbers.to(tl.float32)
    else:
        LENGTH: tl.constexpr = BLOCK if SIDE == "k" else WIDTH
        integer = unpacked(numbers, start if SIDE == "k" else FIRST, LENGTH, CODEC == "int4")
        tile = integer * per_number(step, LENGTH) + per_number(lowest, LENGTH)
        if SIDE == "k":
            tile = tl.trans(tile)
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
    AT_ONCE: tl.constexpr,
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
        for first in range(0, HEADS, AT_ONCE):
            head = first_head + first
            tiles = _read_heads(source, head, start, 0, DIM, DIM_BLOCK, DIM, CODEC, SIDE, GROUP, PAGE, BLOCK, AT_ONCE)
            for nth in tl.static_range(AT_ONCE):
                tile = _decoded(tiles[nth], start, 0, DIM_BLOCK, CODEC, SIDE, BLOCK)
                to = out + (head + nth) * out_head_stride + dim[None, :]
                tl.store(to, tile.to(OUT), mask=inside & (dim < DIM)[None, :])
    elif HALF > 0:
        pair = tl.arange(0, HALF_BLOCK)
        turned = inside & (pair < HALF)[None, :]
        angle = token[:, None] * HALF + pair[None, :]
        cos = tl.load(tl.multiple_of(cosines.to(tl.pointer_type(tl.float32)), 16) + angle, mask=turned, other=0.0)
        sin = tl.load(tl.multiple_of(sines.to(tl.pointer_type(tl.float32)), 16) + angle, mask=turned, other=0.0)
        FIRST: tl.constexpr = 2 * HALF if INTERLEAVED else HALF  # what x is read with, and so many more
        FIRST_BLOCK: tl.constexpr = 2 * HALF_BLOCK if INTERLEAVED else HALF_BLOCK
        for first in range(0, HEADS, AT_ONCE):
            head = first_head + first
            xs = _read_heads(source, head, start, 0, FIRST, FIRST_BLOCK, DIM, CODEC, SIDE, GROUP, PAGE, BLOCK, AT_ONCE)
            ys, rests = xs, xs
            if not INTERLEAVED:
                ys = _read_heads(
                    source, head, start, HALF, 2 * HALF, HALF_BLOCK, DIM, CODEC, SIDE, GROUP, PAGE, BLOCK, AT_ONCE
                )
            if REST_BLOCK > 0:
                rests = _read_heads(
                    source, head, start, 2 * HALF, DIM, REST_BLOCK, DIM, CODEC, SIDE, GROUP, PAGE, BLOCK, AT_ONCE
                )
            for nth in tl.static_range(AT_ONCE):
                to = out + (head + nth) * out_head_stride
                x = _decoded(xs[nth], start, 0, FIRST_BLOCK, CODEC, SIDE, BLOCK)
                if INTERLEAVED:
                    even, odd = tl.split(tl.reshape(x, (BLOCK, HALF_BLOCK, 2)))
                    both = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (BLOCK, FIRST_BLOCK))
                    dim = tl.arange(0, FIRST_BLOCK)
                    tl.store(to + dim[None, :], both.to(OUT), mask=inside & (dim < FIRST)[None, :])
                else:
                    y = _decoded(ys[nth], start, HALF, HALF_BLOCK, CODEC, SIDE, BLOCK)
                    tl.store(to + pair[None, :], (x * cos - y * sin).to(OUT), mask=turned)
                    tl.store(to + HALF + pair[None, :], (y * cos + x * sin).to(OUT), mask=turned)
                if REST_BLOCK > 0:
                    rest = 2 * HALF + tl.arange(0, REST_BLOCK)
                    tile = _decoded(rests[nth], start, 2 * HALF, REST_BLOCK, CODEC, SIDE, BLOCK)
                    tl.store(to + rest[None, :], tile.to(OUT), mask=inside & (rest < DIM)[None, :])
