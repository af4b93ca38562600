"""What must hold of an operation's tensors; messages say what must hold and what was got.

H heads, T tokens, N keys, S queries, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragkv.kernels.dispatch import KernelError
from ragkv.kernels.stored import Piece, Stored

_RAW = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SMALL = (torch.float32, torch.float16)


def require(holds: bool, message: str) -> None:
    """Raise with ``message`` unless it holds.

    Raises:
        KernelError: it does not hold.
    """
    if not holds:
        raise KernelError(message)


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | None], legend: str) -> None:
    """The tensor has this shape; ``None`` stands for any size.

    Raises:
        KernelError: it has not.
    """
    got = tuple(tensor.shape)
    fits = len(got) == len(shape) and all(want is None or want == size for want, size in zip(shape, got, strict=True))
    if not fits:
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise KernelError(f"{name} must be {legend} = [{want}], got {list(got)}")


def check_index(name: str, index: Tensor, length: int | None, legend: str) -> None:
    """A vector of integers.

    Raises:
        KernelError: it is not.
    """
    check_shape(name, index, [length], legend)
    require(index.dtype in (torch.int32, torch.int64), f"{name} must be int32 or int64, got {index.dtype}")


def check_same(what: str, **tensors: Tensor) -> None:
    """One dtype and one device.

    Raises:
        KernelError: they differ.
    """
    kinds = {f"{tensor.dtype} on {tensor.device}" for tensor in tensors.values()}
    if len(kinds) > 1:
        got = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
        raise KernelError(f"{what} must have one dtype and device, got {got}")


def check_piece(piece: Piece) -> None:
    """A piece's parts fit together.

    Raises:
        KernelError: they do not.
    """
    stored = piece.stored
    check_shape("out", piece.out, stored.shape, "[H, T, D]")
    require(piece.out.dtype in _RAW, f"out must be floating point, got {piece.out.dtype}")
    check_stored(stored)
    if piece.cos is None and piece.sin is None:
        return
    require(piece.cos is not None and piece.sin is not None, "cos and sin must be given both or not at all")
    assert piece.cos is not None and piece.sin is not None
    half = piece.cos.shape[-1]
    require(2 * half <= stored.shape[2], f"cos turns {2 * half} dimensions, head_dim is {stored.shape[2]}")
    for name, table in (("cos", piece.cos), ("sin", piece.sin)):
        check_shape(name, table, [stored.shape[1], half], "[T, R / 2]")
        require(table.dtype == torch.float32, f"{name} must be float32, got {table.dtype}")


def check_stored(stored: Stored) -> None:
    """What a codec or a pool holds is complete.

    Raises:
        KernelError: it is not.
    """
    heads, tokens, dim = stored.shape
    if stored.codec == "raw":
        if stored.slots is None:
            require(stored.numbers.dtype in _RAW, f"raw numbers must be floating point, got {stored.numbers.dtype}")
            check_shape("numbers", stored.numbers, stored.shape, "[H, T, D]")
            return
        check_pool(stored)
        check_shape("slots", stored.slots, [tokens], "[T]")
        require(stored.slots.dtype == torch.int64, f"slots must be int64, got {stored.slots.dtype}")
        return
    require(stored.codec in ("int8", "int4", "fp8"), f"codec must be raw, int8, int4 or fp8, got {stored.codec!r}")
    require(stored.slots is None, f"a pool holds raw numbers, got codec {stored.codec!r}")
    require(stored.scale is not None, f"codec {stored.codec!r} needs its scales")
    assert stored.scale is not None
    if stored.codec == "fp8":
        require(stored.numbers.dtype == torch.float8_e4m3fn, f"fp8 numbers must be e4m3, got {stored.numbers.dtype}")
        check_shape("numbers", stored.numbers, stored.shape, "[H, T, D]")
        wanted = [heads, 1, dim] if stored.side == "k" else [heads, tokens, 1]
        check_shape("scale", stored.scale, wanted, "[H, 1, D] for K, [H, T, 1] for V")
        require(stored.scale.dtype == torch.float32, f"scale must be float32, got {stored.scale.dtype}")
        return
    _check_grouped(stored, stored.scale)


def check_pool(stored: Stored) -> None:
    """Numbers are a pool's.

    Raises:
        KernelError: they are not.
    """
    require(stored.numbers.dtype in _RAW, f"raw numbers must be floating point, got {stored.numbers.dtype}")
    check_shape("numbers", stored.numbers, [None, stored.shape[0], None, stored.shape[2]], "a pool [blocks, H, P, D]")


def _check_grouped(stored: Stored, step: Tensor) -> None:
    lines, length = stored.lines
    require(stored.numbers.dtype == torch.uint8, f"{stored.codec} numbers must be uint8, got {stored.numbers.dtype}")
    check_shape("numbers", stored.numbers, [stored.shape[0], lines, None], "[H, lines, bytes of a line]")
    check_shape("step", step, [stored.shape[0], lines, None], "[H, lines, G]")
    require(stored.low is not None, f"codec {stored.codec!r} needs its lowest numbers")
    assert stored.low is not None
    check_shape("low", stored.low, tuple(step.shape), "[H, lines, G]")
    for name, part in (("step", step), ("low", stored.low)):
        require(part.dtype in _SMALL, f"{name} must be float16 or float32, got {part.dtype}")
    groups, size = step.shape[2], stored.group
    if stored.shape[0] and lines and length:
        holds = groups * size >= length > (groups - 1) * size
        require(holds, f"{groups} groups of {size} do not make up the {length} numbers of a line")
