"""Jit primitives that read stored numbers as fp32 tiles.

A line is what is quantised together: a channel of K, a token of V. L lines of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def from_e4m3(byte):
    """fp32 of e4m3 bytes: their exponent and fraction read as fp32 bits are the number times 2^-120. Infinity and NaN, which the
    codec never writes, are read as 480.
    """
    bits = byte.to(tl.int8, bitcast=True).to(tl.int32) << 20  # the sign is in all bits above
    return (bits & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def unpacked(number, first, stop, LENGTH: tl.constexpr, INT4: tl.constexpr, PAIRS: tl.constexpr):
    """Integers ``first .. first + LENGTH - 1`` of the lines at ``number [L, 1]``, as fp32 ``[L, LENGTH]``; 0 from ``stop`` on.

    int4 holds two a byte. With PAIRS ``first`` and ``stop`` are even: every byte is read once.
    """
    if INT4 and PAIRS:
        at = first // 2 + tl.arange(0, LENGTH // 2)
        byte = tl.load(number + at[None, :], mask=(at < stop // 2)[None, :], other=0)
        integer = tl.reshape(tl.join(byte & 15, byte >> 4), (byte.shape[0], LENGTH))
    elif INT4:
        at = first + tl.arange(0, LENGTH)
        byte = tl.load(number + (at // 2)[None, :], mask=(at < stop)[None, :], other=0)
        integer = (byte >> ((at % 2) * 4).to(tl.uint8)[None, :]) & 15
    else:
        at = first + tl.arange(0, LENGTH)
        integer = tl.load(number + at[None, :], mask=(at < stop)[None, :], other=0)
    return integer.to(tl.float32)


@triton.jit
def per_number(scale, first, stop, group, LENGTH: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr):
    """The scale of integers ``first .. first + LENGTH - 1`` of the lines at ``scale [L, 1]``, fp32 ``[L, LENGTH]`` or ``[L, 1]``.

    With WHOLE a tile holds whole groups of GROUP numbers, or lies within one: each scale is read once.
    """
    if WHOLE and GROUP >= LENGTH:
        read = tl.load(scale + first // GROUP).to(tl.float32)
    elif WHOLE:
        at = first // GROUP + tl.arange(0, LENGTH // GROUP)
        read = tl.load(scale + at[None, :], mask=(at * GROUP < stop)[None, :], other=0).to(tl.float32)
        spread = tl.broadcast_to(read[:, :, None], (read.shape[0], LENGTH // GROUP, GROUP))
        read = tl.reshape(spread, (spread.shape[0], LENGTH))
    else:
        at = first + tl.arange(0, LENGTH)
        read = tl.load(scale + (at // group)[None, :], mask=(at < stop)[None, :], other=0).to(tl.float32)
    return read
