"""Placing all layers of a prompt: one table for all that goes there, put together from what is known of each source.

L layers, T tokens, N tokens of the prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ragkv.kernels.layers import Brought, Layers, Run, Turn
from ragkv.kernels.stored import Stored
from ragkv.kernels.triton_impl.place import Held, Kind, described, launch_kind
from ragkv.kernels.upload import arrive, beside
from ragkv.kernels.validation import require

_FIELDS = 16  # of a row, see place_kernel.py
_TOKENS, _SLOTS, _COS, _SIN, _OUT = 0, 2, 5, 6, 7
_ADDRESSES = (1, 3, 4)  # of numbers, scales and lowest numbers
_ADDRESS, _READ_STRIDES, _WRITTEN_STRIDES = 1, slice(8, 10), slice(11, 13)

Numbers = NDArray[np.int64 | np.bool_]


class _Described(NamedTuple):
    """What the table says of all layers of one place.

    Attributes:
        rows: ``[L, 2, 16]`` as something that is read.
        kinds: the distinct ones.
        kind: ``[L, 2]`` which of them each is.
        token_bytes: ``[L, 2]`` from one token to the next.
        copies: what the rows point to besides.
        points: ``[L, 2, 16]`` 1 where a row holds an address of what is read.
    """

    rows: Numbers
    kinds: list[Held]
    kind: Numbers
    token_bytes: Numbers
    copies: list[Tensor]
    points: Numbers


class _Turned(NamedTuple):
    """What the table says of how keys turn.

    Attributes:
        addresses: ``[L, 2]`` of cosines and sines; 0 where a layer's keys do not turn.
        token_bytes: ``[L]`` from one token to the next; 0 there too.
        kinds: ``[L]`` half of the rotated dimensions and how they pair.
    """

    addresses: Numbers
    token_bytes: Numbers
    kinds: list[tuple[int, bool]]


def placing(out: Layers, runs: Sequence[Run], groups: Sequence[range]) -> Callable[[int], None]:
    """See :func:`ragkv.kernels.placing`; one launch for all of a group that is of a kind."""
    layers = range(groups[0].start, groups[-1].stop)
    room, span = _of(out), slice(layers.start, layers.stop)
    sources: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        sources[id(run.source)].append(run)
    distinct = {id(run.turns): run.turns for run in runs if run.turns is not None}
    turning = {key: _turned(turns) for key, turns in distinct.items()}
    turned = dict.fromkeys(kind for each in turning.values() for kind in each.kinds[span] if kind[0])
    # What turns in one way and what does not share a launch.
    ways = list(turned) if len(turned) == 1 else [(0, False), *turned]
    host, table = beside(
        len(runs) * len(layers) * 2 * _FIELDS + sum(run.tokens for run in runs if run.source.paged), out.device
    )
    rows = host.numpy()[: len(runs) * len(layers) * 2 * _FIELDS].reshape(len(runs), len(layers), 2, _FIELDS)
    codes = np.empty(rows.shape[:3], dtype=np.int64)
    at, behind, held = 0, rows.size, dict[Held, int]()
    for mine in sources.values():
        source, here = _of(mine[0].source), slice(at, at + len(mine))
        rows[here] = source.rows[span]
        rows[here, ..., _OUT] = room.rows[span, :, _ADDRESS]
        rows[here, ..., _WRITTEN_STRIDES] = room.rows[span, :, _READ_STRIDES]
        known = np.array([held.setdefault(kind, len(held)) for kind in source.kinds])[source.kind[span]]
        codes[here] = (known * len(room.kinds) + room.kind[span]) * len(ways)
        for number, run in enumerate(mine, at):
            rows[number, ..., _TOKENS] = run.tokens
            rows[number, ..., _OUT] += run.start * room.token_bytes[span]
            if run.slots is not None:
                host[behind : behind + run.tokens] = run.slots
                rows[number, ..., _SLOTS] = table.data_ptr() + behind * host.itemsize
                behind += run.tokens
            if run.turns is not None:
                turns = turning[id(run.turns)]
                first = (run.start * turns.token_bytes[span])[:, None]
                rows[number, :, 0, _COS : _SIN + 1] = turns.addresses[span] + first
                codes[number, :, 0] += [ways.index(kind) if kind[0] else 0 for kind in turns.kinds[span]]
        at += len(mine)
    kinds = len(held) * len(room.kinds) * len(ways)
    codes += kinds * np.repeat(range(len(groups)), [len(group) for group in groups])[:, None]
    launches = _launches(rows.reshape(-1, _FIELDS), codes.ravel(), kinds, list(held), room.kinds, ways)
    arrive(host, table)
    every = table[: rows.size].view(-1, _FIELDS)

    def place(number: int, alive: object = (out, runs)) -> None:  # whose addresses are in the table
        for kind, first, stop, longest in launches.get(number, ()):
            launch_kind(kind, every[first:stop], longest)

    return place


def _launches(
    rows: Numbers, codes: Numbers, kinds: int, held: list[Held], rooms: list[Held], ways: list[tuple[int, bool]]
) -> dict[int, list[tuple[Kind, int, int, int]]]:
    """Brings rows of one kind side by side, group by group; by group the launches: kind, rows from and to, longest."""
    if (codes != codes[0]).any():
        order = np.argsort(codes, kind="stable")
        rows[:], codes = rows[order], codes[order]
    launches: dict[int, list[tuple[Kind, int, int, int]]] = defaultdict(list)
    for first, stop in pairwise([0, *(np.flatnonzero(np.diff(codes)) + 1), len(rows)]):
        group, code = divmod(int(codes[first]), kinds)
        both, way = divmod(code, len(ways))
        read, written = divmod(both, len(rooms))
        room = rooms[written]
        kind = Kind.of(held[read], room.dtypes[0], room.dense, *ways[way])
        launches[group].append((kind, int(first), int(stop), int(rows[first:stop, _TOKENS].max())))
    return launches


def _of(layers: Layers) -> _Described:
    """What the table says of some layers, looked up once."""
    if layers.described is None:
        layers.described = _moved(layers) if isinstance(layers, Brought) else _describe(layers)
    return layers.described


def _moved(layers: Brought) -> _Described:
    source = _of(layers.source)
    require(not source.copies, "what is brought elsewhere must lie there as it is read")
    return source._replace(rows=source.rows + np.array(layers.shifts, np.int64)[:, None, None] * source.points)


def _describe(layers: Layers) -> _Described:
    kinds, copies = dict[Held, int](), list[Tensor]()
    found = [[described(_dense(stored), copies) for stored in pair] for pair in layers.pairs]
    kind = np.array([[kinds.setdefault(what, len(kinds)) for what, _ in pair] for pair in found])
    rows = np.array([[row for _, row in pair] for pair in found], dtype=np.int64)
    sizes = [[stored.numbers.itemsize for stored in pair] for pair in layers.pairs]
    points = np.isin(np.arange(_FIELDS), _ADDRESSES) & (rows != 0)
    return _Described(rows, list(kinds), kind, rows[..., _READ_STRIDES.stop - 1] * np.array(sizes), copies, points)


def _dense(stored: Stored) -> Stored:
    numbers = stored.numbers
    require(
        numbers.stride(-1) == 1 or numbers.shape[-1] <= 1,
        f"layers must have their dimensions side by side (a last stride of 1), got strides {numbers.stride()}",
    )
    return stored


def _turned(turns: Sequence[Turn | None]) -> _Turned:
    addresses = [[0, 0] if turn is None else [_address(turn.cos), _address(turn.sin)] for turn in turns]
    kinds = [(0, False) if turn is None else (turn.cos.shape[1], turn.interleaved) for turn in turns]
    return _Turned(np.array(addresses, dtype=np.int64), 4 * np.array([half for half, _ in kinds]), kinds)


def _address(table: Tensor) -> int:
    require(table.is_contiguous(), "cos and sin must be contiguous")
    return table.data_ptr()
