"""Moving keys and values: into the prompt, over what was there, and how far apart they are.

H kv heads, T tokens, S fresh tokens, N tokens of the prompt, D head_dim, R rotated dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ragkv.kernels import reference
from ragkv.kernels.dispatch import DTYPES, Impl, KernelError, implementation
from ragkv.kernels.layers import Layers, Run, Turn
from ragkv.kernels.stored import Piece, Stored
from ragkv.kernels.validation import check_index, check_piece, check_same, check_shape, require


def place(
    out: Tensor,
    stored: Tensor | Stored,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
    impl: Impl = "auto",
) -> None:
    """Copy stored keys or values to their slots: decode, rotate on the way; without tables, only copy.

    Arithmetic is fp32, whatever the dtypes.

    Args:
        out: ``[H, T, D]``, written; may be a strided view.
        stored: ``[H, T, D]``, or what a codec or a pool holds.
        cos: ``[T, R / 2]`` fp32, from :func:`~ragkv.kernels.rotation_tables`.
        sin: ``[T, R / 2]`` fp32.
        interleaved: which dimensions form a pair, see :class:`~ragkv.kernels.Rotation`.
        impl: which implementation runs.

    Raises:
        KernelError: shapes, dtypes or devices do not fit together, or ``impl`` cannot run here.
        MissingPackageError: ``impl`` names triton and it is not installed.
    """
    source = stored if isinstance(stored, Stored) else Stored.raw(stored)
    place_pieces([Piece(out, source, cos, sin, interleaved)], impl=impl)


def place_pieces(pieces: Sequence[Piece], *, impl: Impl = "auto") -> None:
    """:func:`place` for any number of chunks and layers, K and V alike.

    The Triton version takes one launch for all pieces of the same kind (codec, side, dtypes, heads, dims, pairing). It reads
    pinned CPU memory too, straight over the bus: what lies there must not be freed or changed before the stream has run.

    Args:
        pieces: what goes where; their slots must not overlap.
        impl: which implementation runs.

    Raises:
        KernelError, MissingPackageError: as :func:`place`.
    """
    for piece in pieces:
        check_piece(piece)
    if not pieces:
        return
    out = pieces[0].out
    require(all(piece.out.device == out.device for piece in pieces), "all pieces must go to one device")
    if implementation(impl, out.device, _computed(pieces)) == "reference":
        reference.place_pieces(pieces)
        return
    from ragkv.kernels.triton_impl.place import place_pieces as fused

    for piece in pieces:
        _check_reachable(piece)
        _check_dense("out", piece.out)
    fused(pieces)


def place_layers(out: Layers, runs: Sequence[Run], *, layers: range | None = None, impl: Impl = "auto") -> None:
    """:func:`place` for K and V of many layers of one prompt, whose parts come from chunks and pools of as many layers.

    The Triton version builds one table out of what was found of each source before, and takes one launch for all that is of a kind,
    as :func:`place_pieces`; nothing waits for the device.

    Args:
        out: the prompt's K and V ``[H, N, D]``, written.
        runs: what goes where; their slots must not overlap.
        layers: which; all by default.
        impl: which implementation runs.

    Raises:
        KernelError, MissingPackageError: as :func:`place`.
    """
    placing(out, runs, [range(len(out)) if layers is None else layers], impl=impl)(0)


def placing(out: Layers, runs: Sequence[Run], groups: Sequence[range], *, impl: Impl = "auto") -> Callable[[int], None]:
    """:func:`place_layers` in several steps, prepared at once: what is returned places the layers of a group, by its number.

    Args:
        out: as of :func:`place_layers`, like the rest.
        runs: what goes where. It need not be there before its group is placed.
        groups: layers that are placed together, one after the other.
        impl: which implementation runs.

    Raises:
        KernelError, MissingPackageError: as :func:`place`.
    """
    layers = range(groups[0].start, groups[-1].stop)
    follow = all(before.stop == after.start for before, after in pairwise(groups))
    good = layers.start >= 0 and layers.stop <= len(out) and all(group.step == 1 for group in groups)
    if not good or not follow:
        raise KernelError(f"there are {len(out)} layers, got {', '.join(map(str, groups))}")
    require(not out.paged and not out.encoded, "out must be numbers")
    turns: dict[int, Run] = {}  # the last one of each
    for run in runs:
        _check_run(out, run)
        other = turns.get(id(run.turns), run)
        turns[id(run.turns)] = run if run.start >= other.start else other
    for last in turns.values():
        if last.turns is not None:
            _check_turns(out, last.turns, last.start + last.tokens)
    runs = [run for run in runs if run.tokens]
    if not runs or not layers:
        return lambda number: None
    dtypes = out.dtypes.union(*(run.source.dtypes for run in runs))
    odd = next((dtype for dtype in dtypes if dtype not in DTYPES), torch.float32)
    if implementation(impl, out.device, odd) == "reference":
        return lambda number: reference.place_layers(out, runs, groups[number])
    from ragkv.kernels.triton_impl.place_layers import placing as fused

    return fused(out, runs, groups)


def deviation(fresh: Tensor, stored: Tensor, *, rows: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """Squared distance of fresh and stored keys (or values) per token, over heads and dimensions, in fp32.

    Args:
        fresh: ``[H, S, D]``.
        stored: ``[H, S, D]``; with ``rows`` ``[H, N, D]``, of which these rows are compared.
        rows: ``[S]`` integers below N.
        impl: which implementation runs.

    Returns:
        ``[S]`` fp32.

    Raises:
        KernelError, MissingPackageError: as :func:`place`.
    """
    check_shape("fresh", fresh, [None, None, None], "[H, S, D]")
    heads, tokens, dim = fresh.shape
    check_shape("stored", stored, [heads, tokens if rows is None else None, dim], "[H, S or N, D]")
    check_same("fresh and stored", fresh=fresh, stored=stored)
    if rows is not None:
        check_index("rows", rows, tokens, "[S]")
    if implementation(impl, fresh.device, fresh.dtype) == "reference":
        return reference.deviation(fresh, stored, rows)
    from ragkv.kernels.triton_impl.scatter import deviation as fused

    return fused(fresh, stored, rows)


def scatter(
    fresh_keys: Tensor,
    fresh_values: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    impl: Impl = "auto",
) -> None:
    """Write fresh K and V to their rows of the cache.

    Args:
        fresh_keys: ``[H, S, D]``.
        fresh_values: ``[H, S, Dv]``.
        rows: ``[S]`` integers below N. Of those given more than once, some token's is written.
        keys: ``[H, N, D]``, written; may be a strided view.
        values: ``[H, N, Dv]``, written; may be a strided view.
        impl: which implementation runs.

    Raises:
        KernelError, MissingPackageError: as :func:`place`.
    """
    check_shape("fresh_keys", fresh_keys, [None, None, None], "[H, S, D]")
    heads, tokens, dim = fresh_keys.shape
    check_shape("fresh_values", fresh_values, [heads, tokens, None], "[H, S, Dv]")
    check_shape("keys", keys, [heads, None, dim], "[H, N, D]")
    check_shape("values", values, [heads, keys.shape[1], fresh_values.shape[2]], "[H, N, Dv]")
    check_index("rows", rows, tokens, "[S]")
    check_same(
        "keys and values, fresh and held", fresh_keys=fresh_keys, fresh_values=fresh_values, keys=keys, values=values
    )
    if implementation(impl, keys.device, keys.dtype) == "reference":
        reference.scatter(fresh_keys, fresh_values, rows, keys, values)
        return
    from ragkv.kernels.triton_impl.scatter import scatter as fused

    _check_dense("keys", keys)
    _check_dense("values", values)
    fused(fresh_keys, fresh_values, rows, keys, values)


def _check_run(out: Layers, run: Run) -> None:
    source, tokens = run.source, run.tokens
    if source.kinds != out.kinds:
        raise KernelError(f"out has heads and dimensions {out.kinds} in its layers, the source has {source.kinds}")
    if source.device != out.device:
        raise KernelError(f"out is on {out.device}, the source on {source.device}")
    if run.start < 0 or run.start + tokens > out.tokens:
        raise KernelError(f"slots {run.start} to {run.start + tokens} of {out.tokens}")
    require(source.paged == (run.slots is not None), "slots must be given of pools, and of nothing else")
    if run.slots is None:
        if tokens != source.tokens and (source.encoded or not 0 <= tokens < source.tokens):
            raise KernelError(
                f"of {source.tokens} tokens of a chunk all are placed, or the first ones of numbers, got {tokens}"
            )
    else:
        check_shape("slots", run.slots, [tokens], "[T]")
        cpu = run.slots.dtype == torch.int64 and run.slots.is_cpu
        require(cpu, f"slots must be int64 on the CPU, got {run.slots.dtype} on {run.slots.device}")


def _check_turns(out: Layers, turns: Sequence[Turn | None], stop: int) -> None:
    """They tell how keys turn in all slots below ``stop``."""
    require(len(turns) == len(out), f"out has {len(out)} layers, {len(turns)} turn")
    checked: dict[tuple[int, int], None] = {}
    for turn, (keys, _) in zip(turns, out.pairs, strict=True):
        if turn is None or (id(turn), keys.shape[2]) in checked:
            continue
        checked[id(turn), keys.shape[2]] = None
        half = turn.cos.shape[-1]
        require(2 * half <= keys.shape[2], f"cos turns {2 * half} dimensions, head_dim is {keys.shape[2]}")
        for name, table in (("cos", turn.cos), ("sin", turn.sin)):
            check_shape(name, table, [None, half], "[N, R / 2]")
            require(len(table) >= stop, f"{name} must reach to slot {stop - 1}, got {len(table)} slots")
            require(table.dtype == torch.float32, f"{name} must be float32, got {table.dtype}")
            require(table.device == out.device, f"{name} must be on {out.device}, got {table.device}")


def _computed(pieces: Sequence[Piece]) -> torch.dtype:
    """The dtype that decides whether triton can compute them: one that it cannot, if there is any."""
    dtypes = [piece.out.dtype for piece in pieces]
    dtypes += [piece.stored.numbers.dtype for piece in pieces if piece.stored.codec == "raw"]
    return next((dtype for dtype in dtypes if dtype not in DTYPES), torch.float32)


def _check_dense(name: str, written: Tensor) -> None:
    """What triton writes has its dimensions side by side: it is never copied."""
    dense = written.stride(-1) == 1 or written.shape[-1] <= 1
    require(dense, f"{name} must have its dimensions side by side (a last stride of 1), got strides {written.stride()}")


def _check_reachable(piece: Piece) -> None:
    """The device can read it: it lies there, or in pinned CPU memory."""
    stored, device = piece.stored, piece.out.device
    parts = {"numbers": stored.numbers, "scale": stored.scale, "low": stored.low, "slots": stored.slots}
    for name, part in {**parts, "cos": piece.cos, "sin": piece.sin}.items():
        reachable = part is None or part.device == device or (part.device.type == "cpu" and part.is_pinned())
        require(reachable, f"{name} must be on {device} or in pinned CPU memory")
