"""Jit primitives that read stored numbers, and those that make fp32 tiles of them.

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
def read_line(number, first, stop, LENGTH: tl.constexpr, PAIRS: tl.constexpr, INT4: tl.constexpr):
    """Bytes of integers ``first .. first + LENGTH - 1`` of the lines at ``number [L, 1]``; 0 from ``stop`` on.

    int4 holds two a byte. With PAIRS ``first`` and ``stop`` are even, every byte is read once: ``[L, LENGTH / 2]``. Else
    ``[L, LENGTH]``.
    """
    if PAIRS:
        at = first // 2 + tl.arange(0, LENGTH // 2)
        inside = at < stop // 2
    else:
        at = first + tl.arange(0, LENGTH)
        inside = at < stop
        if INT4:
            at = at // 2
    return tl.load(number + at[None, :], mask=inside[None, :], other=0)


@triton.jit
def unpacked(byte, first, LENGTH: tl.constexpr, INT4: tl.constexpr):
    """The integers of :func:`read_line`, as fp32 ``[L, LENGTH]``."""
    integer = byte
    if byte.shape[1] < LENGTH:
        integer = tl.reshape(tl.join(byte & 15, byte >> 4), (byte.shape[0], LENGTH))
    elif INT4:
        at = first + tl.arange(0, LENGTH)
        integer = (byte >> ((at % 2) * 4).to(tl.uint8)[None, :]) & 15
    return integer.to(tl.float32)


@triton.jit
def read_scale(scale, first, stop, group, LENGTH: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr):
    """The scales of integers ``first .. first + LENGTH - 1`` of the lines at ``scale [L, 1]``.

    With WHOLE a tile holds whole groups of GROUP numbers, or lies within one: each scale is read once, ``[L, LENGTH / GROUP]`` or
    ``[L, 1]``. Else one a number, ``[L, LENGTH]``.
    """
    if WHOLE and GROUP >= LENGTH:
        read = tl.load(scale + first // GROUP)
    elif WHOLE:
        at = first // GROUP + tl.arange(0, LENGTH // GROUP)
        read = tl.load(scale + at[None, :], mask=(at * GROUP < stop)[None, :], other=0)
    else:
        at = first + tl.arange(0, LENGTH)
        read = tl.load(scale + (at // group)[None, :], mask=(at < stop)[None, :], other=0)
    return read


@triton.jit
def per_number(scale, LENGTH: tl.constexpr):
    """The scales of :func:`read_scale`, as fp32 ``[L, LENGTH]`` or ``[L, 1]``."""
    scale = scale.to(tl.float32)
    GROUPS: tl.constexpr = scale.shape[1]
    if GROUPS > 1 and GROUPS < LENGTH:
        spread = tl.broadcast_to(scale[:, :, None], (scale.shape[0], GROUPS, LENGTH // GROUPS))
        scale = tl.reshape(spread, (scale.shape[0], LENGTH))
    return scale
