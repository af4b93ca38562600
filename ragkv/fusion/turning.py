"""How the keys of one prompt's chunks turn from where they stood to where they stand.

L layers, N tokens of the prompt, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ragkv.fusion.layout import Layout
from ragkv.kernels import Rotation, Turn, rotation_tables
from ragkv.kernels.upload import sent
from ragkv.lazy import lazy


class Turning:
    """Tables by slot, made once a prompt for each distinct rotation.

    Args:
        rotations: of every layer; ``None`` where keys carry no position.
        layout: the prompt.
    """

    def __init__(self, rotations: Sequence[Rotation | None], layout: Layout):
        self._rotations, self._layout = rotations, layout
        self._tables: dict[tuple[int, bool, torch.device], Turn] = {}

    @lazy
    def layers(self) -> list[Turn | None]:
        """Of every layer, on the prompt's device."""
        return self._of_layers(False)

    @lazy
    def unrotated(self) -> list[Turn | None]:
        """The same of keys that are as they were before rotary embedding."""
        return self._of_layers(True)

    def _of_layers(self, unrotated: bool) -> list[Turn | None]:
        return [self.layer(number, self._layout.ids.device, unrotated) for number in range(len(self._rotations))]

    def layer(self, layer: int, device: torch.device, unrotated: bool = False) -> Turn | None:
        """Of one layer's keys; ``None`` where they do not turn.

        Args:
            layer: which.
            device: where its keys are.
            unrotated: they are as they were before rotary embedding.
        """
        rotation = self._rotations[layer]
        if rotation is None:
            return None
        kind = id(rotation), unrotated, device
        if kind not in self._tables:
            old, new = self._positions
            old = torch.zeros_like(new) if unrotated else old
            cos, sin = (table.to(device) for table in rotation_tables(rotation, old, new))
            self._tables[kind] = Turn(cos, sin, rotation.interleaved)
        return self._tables[kind]

    @lazy
    def _positions(self) -> tuple[Tensor, Tensor]:
        """``[N]`` where each token stood when its KV were made, and where it stands."""
        layout = self._layout
        back = [0, *(placed.base - placed.position for placed in layout.chunks), 0]
        moved = torch.from_numpy(np.repeat(np.array(back, dtype=np.int64), layout.lengths))
        return layout.positions + sent(moved, layout.ids.device), layout.positions
