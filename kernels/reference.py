"""The operations in plain torch: they run anywhere and define what the fused kernels compute.

H kv heads, T tokens, D head_dim, R rotated dimensions of a head (R <= D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """How rotary embedding turns one layer's keys (RoFormer, arXiv:2104.09864).

    Attributes:
        inv_freq: ``[R / 2]`` fp32, radians per position of each pair.
        interleaved: pairs are ``(2i, 2i + 1)``; otherwise ``(i, i + R / 2)``.
    """

    inv_freq: Tensor
    interleaved: bool

    @property
    def rotary_dim(self) -> int:
        """R, the rotated dimensions at the head's beginning."""
        return 2 * self.inv_freq.shape[0]


def rotation_tables(rotation: Rotation, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines that carry keys from their old positions to their new ones.

    A model rounds its angles to fp32, by up to 5e-3 at position 100,000. The difference is taken between the angles as
    the model rounds them, in fp64, so that the rotation undoes exactly what the model did.

    Args:
        rotation: the layer's rotation.
        old: ``[T]`` integer positions that the keys stand at.
        new: ``[T]`` integer positions that they shall stand at.

    Returns:
        ``cos`` and ``sin``, each ``[T, R / 2]`` fp32.
    """
    freq = rotation.inv_freq.to(old.device)
    angle = (new.float()[:, None] * freq).double() - (old.float()[:, None] * freq).double()
    return angle.cos().float(), angle.sin().float()


def place(
    out: Tensor, keys: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *, interleaved: bool = False
) -> None:
    """Copy keys to their slots and rotate them on the way; without tables, only copy.

    Arithmetic is fp32, whatever the dtype of ``keys``.

    Args:
        out: ``[H, T, D]``, written; may be a strided view.
        keys: ``[H, T, D]``.
        cos: ``[T, R / 2]`` fp32, from :func:`rotation_tables`.
        sin: ``[T, R / 2]`` fp32.
        interleaved: which dimensions form a pair, see :class:`Rotation`.
    """
    if cos is None or sin is None:
        out.copy_(keys)
        return
    half = cos.shape[-1]
    dim = 2 * half
    even, odd = (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(0, half), slice(half, dim))
    x, y = keys[..., even], keys[..., odd]
    if keys.dtype != torch.float32:
        x, y = x.float(), y.float()
    out[..., even] = torch.mul(x, cos).addcmul_(y, sin, value=-1)
    out[..., odd] = torch.mul(y, cos).addcmul_(x, sin)
    if dim < keys.shape[-1]:
        out[..., dim:] = keys[..., dim:]


def deviation(fresh: Tensor, stored: Tensor) -> Tensor:
    """Squared distance of fresh and stored keys (or values) per token, over heads and dimensions, in fp32.

    Args:
        fresh: ``[H, T, D]``.
        stored: ``[H, T, D]``.

    Returns:
        ``[T]`` fp32.
    """
    return (fresh.float() - stored.float()).square_().sum(dim=(0, 2))
