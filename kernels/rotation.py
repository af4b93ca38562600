"""How keys turn with their position, and the tables by which they are turned further.

T tokens, R rotated dimensions of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

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
