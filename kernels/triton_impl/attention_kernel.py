"""The kernels of selective attention: online softmax over blocks of keys (FlashAttention-2, arXiv:2307.08691).

H query heads, K kv heads, S queries, N keys, D head_dim, P parts of the keys. The rows of a tile are queries and, within a
query, the H / K heads that share a kv head: the fewer queries a tile holds, the closer their spans, and the fewer keys are read for
nothing.
"""

import triton
import triton.language as tl


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` in fp32. Triton's interpreter knows no product of bf16 numbers: they are "widened" for it."""
    if PRECISION == "widened":
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        result = tl.dot(a, b, total, input_precision=PRECISION)
    return result


@triton.jit
def scores_of(query, key, scale, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """``[M, N]`` fp32 scores times log2(e), of ``query [M, D]`` and ``key [N, D]``; ``scale`` has log2(e) in it unless CAPPED."""
    nothing = tl.zeros([query.shape[0], key.shape[0]], tl.float32)
    scores = product(query, tl.trans(key), nothing, PRECISION) * scale
    if CAPPED:  # tanh(x) = 2 sigmoid(2 x) - 1
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * 1.4426950408889634
    return scores


@triton.jit
def rows_of(tile, spans, length, keys, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query, head within its group, first and last key of a tile's rows; rows behind the last query repeat it."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = tl.minimum(row // GROUPS, length - 1)
    first = tl.maximum(tl.load(spans + 2 * query), 0)
    last = tl.minimum(tl.load(spans + 2 * query + 1), keys - 1)
    return row, query, row % GROUPS, first, last


@triton.jit
def _attend(
    state,
    query,
    key,
    value,
    key_stride,
    value_stride,
    first,
    last,
    pieces,
    keys,
    scale,
    softcap,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Take two pieces of blocks of keys into the running maximum, sum and output of every row; their order does not matter."""
    greatest, total, output = state
    begin, count, then, more = pieces
    dim = tl.arange(0, BLOCK_D)
    value_dim = tl.arange(0, BLOCK_V)
    step = tl.arange(0, BLOCK_N)
    key_at = step[:, None] * key_stride + dim[None, :]
    value_at = step[:, None] * value_stride + value_dim[None, :]
    for number in range(count + more):
        block = tl.where(number < count, begin + number, then + number - count)
        start = block.to(tl.int64) * BLOCK_N
        held = (step < keys - start)[:, None] if MASKED else (step >= 0)[:, None]
        k = tl.load(key + start * key_stride + key_at, mask=held & (dim < DIM)[None, :], other=0.0)
        scores = scores_of(query, k, scale, softcap, CAPPED, PRECISION)
        if MASKED:
            at = block * BLOCK_N + step
            seen = (at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(greatest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(greatest - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(value + start * value_stride + value_at, mask=held & (value_dim < VALUE_DIM)[None, :], other=0.0)
        output = product(weights.to(v.dtype), v, output * shrink[:, None], PRECISION)
        greatest = higher
    return greatest, total, output


@triton.jit(do_not_specialize=["length", "keys", "tiles", "parts", "kv_heads", "beside"])
def attention_kernel(
    query,
    key,
    value,
    out,
    greatest_of,
    total_of,
    spans,
    sinks,
    length,
    keys,
    tiles,
    parts,
    kv_heads,
    beside,
    scale,
    softcap,
    query_head_stride,
    query_stride,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    GROUPS: tl.constexpr,
    CAPPED: tl.constexpr,
    SUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: BLOCK_M rows of one kv head over a part of their keys. Grid: K x tiles of rows x P.

    The last tiles, which see most keys, come first: short ones are left to fill gaps (Graham 1969, longest processing time first).
    ``beside`` heads, whose keys and values the GPU's cache holds, take turns. With SPLIT it writes what :func:`combine_kernel` puts
    together: ``out`` ``[P, S, H, Dv]`` fp32 not yet divided, maxima and sums ``[P, S, H]``. With KEPT and without SPLIT, each row's
    normaliser ``[S, H]`` in the maxima's place: log2 of its sum of exponentials.
    """
    number = tl.program_id(0)
    part = number // beside % parts
    tile = tiles - 1 - number // (beside * parts) % tiles
    kv_head = number // (beside * parts * tiles) * beside + number % beside
    row, at, member, first, last = rows_of(tile, spans, length, keys, GROUPS, BLOCK_M)
    head = kv_head * GROUPS + member
    dim = tl.arange(0, BLOCK_D)
    place = head[:, None].to(tl.int64) * query_head_stride + at[:, None].to(tl.int64) * query_stride
    q = tl.load(query + place + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
    key += kv_head.to(tl.int64) * key_head_stride
    value += kv_head.to(tl.int64) * value_head_stride

    # Blocks of keys: all rows see those from `open` to `shut`, which need no mask; before and behind, only some rows do.
    begin = tl.min(first, 0) // BLOCK_N
    blocks = tl.maximum(tl.cdiv(tl.max(last, 0) + 1, BLOCK_N) - begin, 0)
    end = begin + blocks * (part + 1) // parts
    begin += blocks * part // parts
    open = tl.minimum(tl.maximum(tl.cdiv(tl.max(first, 0), BLOCK_N), begin), end)
    shut = tl.minimum(tl.maximum((tl.min(last, 0) + 1) // BLOCK_N, open), end)
    edges = (begin, open - begin, shut, end - shut)
    inner = (open, shut - open, shut, 0)

    greatest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SUNK:  # counted once
        greatest = tl.where(part == 0, tl.load(sinks + head).to(tl.float32) * 1.4426950408889634, greatest)
        total = tl.where(part == 0, 1.0, total)
    state = (greatest, total, tl.zeros([BLOCK_M, BLOCK_V], tl.float32))
    state = _attend(
        state, q, key, value, key_stride, value_stride, first, last, edges, keys, scale, softcap,
        True, CAPPED, PRECISION, DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    state = _attend(
        state, q, key, value, key_stride, value_stride, first, last, inner, keys, scale, softcap,
        False, CAPPED, PRECISION, DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    greatest, total, output = state
    value_dim = tl.arange(0, BLOCK_V)
    heads = kv_heads * GROUPS
    held = row < length * GROUPS
    written = held[:, None] & (value_dim < VALUE_DIM)[None, :]
    place = at.to(tl.int64) * heads + head
    if SPLIT:
        place += part.to(tl.int64) * length * heads
        tl.store(greatest_of + place, greatest, mask=held)
        tl.store(total_of + place, total, mask=held)
    else:
        if KEPT:
            tl.store(greatest_of + place, greatest + tl.log2(total), mask=held)
        output = output / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + place[:, None] * VALUE_DIM + value_dim[None, :], output.to(out.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["rows", "parts"])
def combine_kernel(
    partial, greatest_of, total_of, out, normaliser, rows, parts,
    KEPT: tl.constexpr, VALUE_DIM: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One of the S H rows out of its parts (Flash-Decoding, crfm.stanford.edu/2023/10/12/flashdecoding), AT_ONCE at a time."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_V)
    filled = dim < VALUE_DIM
    greatest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    output = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        at, held = part.to(tl.int64) * rows + row, part < parts
        own = tl.load(greatest_of + at, mask=held, other=float("-inf"))
        totals = tl.load(total_of + at, mask=held, other=0.0)
        read = tl.load(
            partial + at[:, None] * VALUE_DIM + dim[None, :], mask=held[:, None] & filled[None, :], other=0.0
        )
        higher = tl.maximum(greatest, tl.max(own, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weights = tl.exp2(greatest - base), tl.exp2(own - base)
        total = total * shrink + tl.sum(totals * weights, 0)
        output = output * shrink + tl.sum(read * weights[:, None], 0)
        greatest = higher
    if KEPT:
        tl.store(normaliser + row + tl.arange(0, 1), greatest + tl.log2(total))
    output = output / tl.where(total > 0, total, 1.0)
    tl.store(out + row * VALUE_DIM + dim, output.to(out.dtype.element_ty), mask=filled)
