"""Placing, scattering and comparing in plain torch: it runs anywhere and defines what the fused kernels compute.

H kv heads, T tokens, S fresh tokens, N tokens of the prompt, D head_dim, R rotated dimensions of a head (R <= D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragkv.kernels.layers import Layers, Run
from ragkv.kernels.stored import Piece, Stored


def place_pieces(pieces: Sequence[Piece]) -> None:
    """See :func:`ragkv.kernels.place_pieces`."""
    for piece in pieces:
        place(piece.out, decode(piece.stored), piece.cos, piece.sin, interleaved=piece.interleaved)


def place_layers(out: Layers, runs: Sequence[Run], layers: range) -> None:
    """See :func:`ragkv.kernels.place_layers`."""
    for run in runs:
        slots = None if run.slots is None else run.slots.to(out.device)
        for layer in layers:
            turn = None if run.turns is None else run.turns[layer]
            for side, (held, room) in enumerate(zip(run.source.pair(layer), out.pair(layer), strict=True)):
                rows = slice(run.start, run.start + run.tokens)
                stored = held if slots is None else Stored.paged(held.numbers, slots)
                turned = (None, None) if turn is None or side else (turn.cos[rows], turn.sin[rows])
                place(
                    room.numbers[:, rows],
                    decode(stored)[:, : run.tokens],
                    *turned,
                    interleaved=turn is not None and turn.interleaved,
                )


def place(out: Tensor, keys: Tensor, cos: Tensor | None, sin: Tensor | None, *, interleaved: bool) -> None:
    """Copy keys to their slots and rotate them on the way; without tables, only copy."""
    if cos is None or sin is None:
        out.copy_(keys)
        return
    half = cos.shape[-1]
    dim = 2 * half
    even, odd = (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(0, half), slice(half, dim))
    x, y = keys[..., even], keys[..., odd]
    if keys.dtype != torch.float32:
        x, y = x.float(), y.float()
    # Both before either is written: ``keys`` may be ``out``.
    out[..., even], out[..., odd] = torch.mul(x, cos).addcmul_(y, sin, value=-1), torch.mul(y, cos).addcmul_(x, sin)
    if dim < keys.shape[-1]:
        out[..., dim:] = keys[..., dim:]


def decode(stored: Stored) -> Tensor:
    """The numbers ``[H, T, D]``: of their own dtype where they are raw, else fp32."""
    if stored.codec == "raw":
        if stored.slots is None:
            return stored.numbers
        page = stored.numbers.shape[2]
        return stored.numbers[stored.slots // page, :, stored.slots % page].transpose(0, 1)
    assert stored.scale is not None
    if stored.codec == "fp8":
        return stored.numbers.float() * stored.scale
    assert stored.low is not None
    lines, length = stored.lines
    integers = stored.numbers if stored.codec == "int8" else _unpacked(stored.numbers)
    grouped = integers.reshape(stored.shape[0], lines, stored.scale.shape[2], stored.group).float()
    line = (grouped * stored.scale.float()[..., None] + stored.low.float()[..., None]).flatten(2)[..., :length]
    return line.transpose(1, 2) if stored.side == "k" else line


def _unpacked(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def deviation(fresh: Tensor, stored: Tensor, rows: Tensor | None) -> Tensor:
    """See :func:`ragkv.kernels.deviation`."""
    held = stored if rows is None else stored.index_select(1, rows)
    return (fresh.float() - held.float()).square_().sum(dim=(0, 2))


def scatter(fresh_keys: Tensor, fresh_values: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> None:
    """See :func:`ragkv.kernels.scatter`."""
    keys.index_copy_(1, rows.long(), fresh_keys)
    values.index_copy_(1, rows.long(), fresh_values)
