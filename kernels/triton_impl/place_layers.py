"""Placing all layers of a prompt: one table for all that goes there, put together from what is known of each source.

L layers, G runs, T tokens, N tokens of the prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
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

Numbers = NDArray[np.int64]
_Way = tuple[int, bool]  # half of the dimensions that turn, and how they pair


class _Described(NamedTuple):
    """What the table says of all layers of one place.

    Attributes:
        rows: ``[L, 2, 16]`` as something that is read.
        kinds: the distinct ones.
        kind: ``[L, 2]`` which of them each is.
        token_bytes: ``[L, 2]`` from one token to the next.
        copies: what the rows point to besides.
    """

    rows: Numbers
    kinds: list[Held]
    kind: Numbers
    token_bytes: Numbers
    copies: list[Tensor]


class _Turned(NamedTuple):
    """What the table says of how keys turn.

    Attributes:
        addresses: ``[L, 2]`` of cosines and sines; 0 where a layer's keys do not turn.
        token_bytes: ``[L]`` from one token to the next; 0 there too.
        ways: ``[L]`` in which they turn.
    """

    addresses: Numbers
    token_bytes: Numbers
    ways: list[_Way]


def placing(out: Layers, runs: Sequence[Run], groups: Sequence[range]) -> Callable[[int], None]:
    """See :func:`ragkv.kernels.placing`; one launch for all of a group that is of a kind.

    Of runs there may be hundreds, so what is said of all of them is written at once.
    """
    span = slice(groups[0].start, groups[-1].stop)
    room, sources = _of(out), [_of(run.source) for run in runs]
    shape = span.stop - span.start, 2, len(runs), _FIELDS
    size = prod(shape)
    host, table = beside(size + sum(run.tokens for run in runs if run.slots is not None), out.device)
    rows, starts = host.numpy()[:size].reshape(shape), np.array([run.start for run in runs])
    np.stack([source.rows[span] for source in sources], axis=2, out=rows)
    _move(rows, runs, span)
    rows[..., _TOKENS] = [run.tokens for run in runs]
    rows[..., _OUT] = room.rows[span, :, None, _ADDRESS] + starts * room.token_bytes[span, :, None]
    rows[..., _WRITTEN_STRIDES] = room.rows[span, :, None, _READ_STRIDES]
    for number, run in enumerate(runs):
        if run.slots is not None:
            host[size : size + run.tokens] = run.slots
            rows[:, :, number, _SLOTS] = table.data_ptr() + size * host.itemsize
            size += run.tokens
    way, ways = _turn(rows[:, 0], runs, starts, span)
    read, held = _kinds(sources, span)
    group = np.repeat(range(len(groups)), [len(group) for group in groups])[:, None, None]
    codes = ((group * len(held) + read) * len(room.kinds) + room.kind[span, :, None]) * len(ways)
    codes[:, 0] += way
    launches = _launches(rows.reshape(-1, _FIELDS), codes.ravel(), held, room.kinds, ways)
    arrive(host, table)
    every = table[: rows.size].view(-1, _FIELDS)

    def place(number: int, alive: object = (out, runs)) -> None:  # whose addresses are in the table
        for kind, first, stop, longest in launches.get(number, ()):
            launch_kind(kind, every[first:stop], longest)

    return place


def _move(rows: Numbers, runs: Sequence[Run], span: slice) -> None:
    """Have rows ``[L, 2, G, 16]`` of what is brought elsewhere say where that is."""
    brought = {number: run.source.shifts for number, run in enumerate(runs) if isinstance(run.source, Brought)}
    if brought:
        shifts = np.zeros((rows.shape[0], 1, len(runs)), np.int64)
        shifts[:, 0, list(brought)] = np.stack(list(brought.values()), axis=1)[span]
        for column in _ADDRESSES:
            addresses = rows[..., column]
            np.add(addresses, shifts, out=addresses, where=addresses != 0)


def _turn(keys: Numbers, runs: Sequence[Run], starts: Numbers, span: slice) -> tuple[Numbers, list[_Way]]:
    """Have the keys' rows ``[L, G, 16]`` say how they turn; returns in which way ``[L, G]``, of those in the list.

    What turns in one way and what does not share a launch.
    """
    distinct = {id(run.turns): run.turns for run in runs if run.turns is not None}
    turning = {key: _turned(turns) for key, turns in distinct.items()}
    turned = dict.fromkeys(way for each in turning.values() for way in each.ways[span] if way[0])
    ways = list(turned) if len(turned) == 1 else [(0, False), *turned]
    way = np.zeros(keys.shape[:2], np.int64)
    for key, each in turning.items():
        mine = [number for number, run in enumerate(runs) if id(run.turns) == key]
        first = starts[mine] * each.token_bytes[span, None]
        keys[:, mine, _COS : _SIN + 1] = each.addresses[span, None] + first[..., None]
        way[:, mine] = np.array([ways.index(own) if own[0] else 0 for own in each.ways[span]])[:, None]
    return way, ways


def _kinds(sources: Sequence[_Described], span: slice) -> tuple[Numbers, list[Held]]:
    """Of which kind all that is read is ``[L, 2, G]``, of those in the list."""
    held = dict[Held, int]()
    known = [np.array([held.setdefault(kind, len(held)) for kind in source.kinds]) for source in sources]
    read = np.stack([here[source.kind[span]] for here, source in zip(known, sources, strict=True)], axis=2)
    return read, list(held)


def _launches(
    rows: Numbers, codes: Numbers, held: list[Held], rooms: list[Held], ways: list[_Way]
) -> dict[int, list[tuple[Kind, int, int, int]]]:
    """Brings rows of one kind side by side, group by group; by group the launches: kind, rows from and to, longest."""
    if (codes[1:] < codes[:-1]).any():
        order = np.argsort(codes, kind="stable")
        rows[:], codes = rows[order], codes[order]
    launches: dict[int, list[tuple[Kind, int, int, int]]] = defaultdict(list)
    edges = [0, *(np.flatnonzero(codes[1:] != codes[:-1]) + 1).tolist(), len(rows)]
    longest = np.maximum.reduceat(rows[:, _TOKENS], edges[:-1]).tolist()
    for (first, stop), tokens in zip(pairwise(edges), longest, strict=True):
        both, way = divmod(int(codes[first]), len(ways))
        before, written = divmod(both, len(rooms))
        group, read = divmod(before, len(held))
        room = rooms[written]
        kind = Kind.of(held[read], room.dtypes[0], room.dense, *ways[way])
        launches[group].append((kind, first, stop, tokens))
    return launches


def _of(layers: Layers) -> _Described:
    """What the table says of some layers, looked up once; of what is brought elsewhere, where it comes from."""
    if isinstance(layers, Brought):
        require(not _of(layers.source).copies, "what is brought elsewhere must lie there as it is read")
        return _of(layers.source)
    if layers.described is None:
        layers.described = _describe(layers)
    return layers.described


def _describe(layers: Layers) -> _Described:
    kinds, copies = dict[Held, int](), list[Tensor]()
    found = [[described(_dense(stored), copies) for stored in pair] for pair in layers.pairs]
    kind = np.array([[kinds.setdefault(what, len(kinds)) for what, _ in pair] for pair in found])
    rows = np.array([[row for _, row in pair] for pair in found], dtype=np.int64)
    sizes = [[stored.numbers.itemsize for stored in pair] for pair in layers.pairs]
    return _Described(rows, list(kinds), kind, rows[..., _READ_STRIDES.stop - 1] * np.array(sizes), copies)


def _dense(stored: Stored) -> Stored:
    numbers = stored.numbers
    require(
        numbers.stride(-1) == 1 or numbers.shape[-1] <= 1,
        f"layers must have their dimensions side by side (a last stride of 1), got strides {numbers.stride()}",
    )
    return stored


def _turned(turns: Sequence[Turn | None]) -> _Turned:
    """Most layers turn alike: each table is looked at once."""
    tables = {key: _table(turn) for key, turn in {id(turn): turn for turn in turns}.items()}
    every = [tables[id(turn)] for turn in turns]
    ways = [way for _, way in every]
    return _Turned(np.array([at for at, _ in every]), 4 * np.array([half for half, _ in ways]), ways)


def _table(turn: Turn | None) -> tuple[tuple[int, int], _Way]:
    """Where cosines and sines lie, and in which way they turn."""
    if turn is None:
        return (0, 0), (0, False)
    require(turn.cos.is_contiguous() and turn.sin.is_contiguous(), "cos and sin must be contiguous")
    return (turn.cos.data_ptr(), turn.sin.data_ptr()), (turn.cos.shape[1], turn.interleaved)
