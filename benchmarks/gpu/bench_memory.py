"""(b) place, scatter and deviation beside the measured copy bandwidth.

Targets: place 0.85 of it for bf16 and int8 at 16K tokens, deviation 0.8.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import Bench

from ragkv.kernels import (
    Layers,
    Piece,
    Rotation,
    Run,
    Stored,
    Turn,
    deviation,
    place_layers,
    place_pieces,
    rotation_tables,
    scatter,
    slots_of,
)
from ragkv.store.codecs import get_codec

HEADS, DIM, LAYERS = 8, 128, 4  # four layers in one launch: more bytes than any cache of the GPU holds


def run(bench: Bench) -> None:
    """Every operation at several lengths."""
    for tokens in bench.lengths(64, 4096, 16384, 65536):
        chunk = 32 if bench.tiny else 512
        for kind in ("bf16", "pool", "int8", "fp8", "int4"):
            pieces, size = pieces_of(bench, kind, tokens, chunk)
            _timed(bench, partial(place_pieces, pieces, impl=bench.impl), f"place {kind}", tokens, size)
        _at_once(bench, tokens, chunk)
        _compare(bench, tokens)


def _timed(bench: Bench, call: Callable[[], object], operation: str, tokens: int, size: int) -> None:
    bench.timed(call, size=size, benchmark="memory", operation=operation, tokens=tokens)


def pieces_of(bench: Bench, kind: str, tokens: int, chunk: int, sides: str = "kv") -> tuple[list[Piece], int]:
    """K, V or both of every chunk and layer, and the bytes that placing them reads and writes."""
    rotation = Rotation(10000.0 ** -(torch.arange(0, DIM, 2, device=bench.device) / DIM), False)
    new = torch.arange(tokens, device=bench.device)
    cos, sin = rotation_tables(rotation, new % chunk, new)
    pieces, size = [], 0
    for _ in range(LAYERS):
        for side in sides:
            out = torch.empty(HEADS, tokens, DIM, device=bench.device, dtype=bench.dtype)
            turn = (cos, sin) if side == "k" else (None, None)
            if kind == "pool":
                pool = bench.random(tokens // 16, HEADS, 16, DIM)
                slots = slots_of(torch.randperm(tokens // 16, device=bench.device), 16, tokens)
                pieces.append(Piece(out, Stored.paged(pool, slots), *turn))
                size += pool.numel() * pool.element_size()
                continue
            for start in range(0, tokens, chunk):
                stored, taken = _stored(bench, kind, chunk, side)
                rows = slice(start, start + chunk)
                of_cos, of_sin = (None if table is None else table[rows] for table in turn)
                pieces.append(Piece(out[:, rows], stored, of_cos, of_sin))
                size += taken
    return pieces, size + sum(piece.out.nbytes for piece in pieces)


def _at_once(bench: Bench, tokens: int, chunk: int) -> None:
    """All layers of a prompt out of a pool, half of its chunks turned: what the host takes stands beside the kernel's time."""
    rotation = Rotation(10000.0 ** -(torch.arange(0, DIM, 2, device=bench.device) / DIM), False)
    at = torch.arange(tokens, device=bench.device)
    turns = [Turn(*rotation_tables(rotation, at % chunk, at))] * LAYERS
    room = lambda *shape: [(bench.random(*shape), bench.random(*shape)) for _ in range(LAYERS)]  # noqa: E731
    out, pool = Layers.raw(room(HEADS, tokens, DIM)), Layers.pool(room(tokens // 16, HEADS, 16, DIM))
    slots = slots_of(torch.randperm(tokens // 16), 16, tokens).split(chunk)
    runs = [
        Run(pool, start, chunk, mine, turns if start % (2 * chunk) else None)
        for start, mine in zip(range(0, tokens, chunk), slots, strict=True)
    ]
    size = 2 * 2 * LAYERS * out.pairs[0][0].numbers.nbytes
    _timed(bench, lambda: place_layers(out, runs, impl=bench.impl), "place layers at once", tokens, size)


def _stored(bench: Bench, kind: Any, tokens: int, side: Any) -> tuple[Stored, int]:
    numbers = bench.random(HEADS, tokens, DIM)
    if kind == "bf16":
        return Stored.raw(numbers), numbers.numel() * numbers.element_size()
    parts = get_codec(kind).encode(numbers.float().cpu(), side)
    parts = {name: part.to(bench.device) for name, part in parts.items()}
    size = sum(part.numel() * part.element_size() for part in parts.values())
    return Stored.encoded(kind, parts, (HEADS, tokens, DIM), side), size


def _compare(bench: Bench, tokens: int) -> None:
    fresh, stored = bench.random(HEADS, tokens, DIM), bench.random(HEADS, tokens, DIM)
    size = 2 * fresh.numel() * fresh.element_size() + 4 * tokens
    _timed(bench, lambda: deviation(fresh, stored, impl=bench.impl), "deviation", tokens, size)
    few = tokens * 15 // 100
    rows = torch.randperm(tokens, device=bench.device)[:few].sort().values
    keys, values = fresh[:, :few].contiguous(), stored[:, :few].contiguous()
    size = 2 * 2 * keys.numel() * keys.element_size()
    _timed(bench, lambda: scatter(keys, values, rows, fresh, stored, impl=bench.impl), "scatter", tokens, size)
