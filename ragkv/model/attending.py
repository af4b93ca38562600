"""What tokens attend to, by owner of the keys, taken while a model runs: sums, and no matrix where attention makes none.

A model's attention function is run once more in every layer, with marks of the keys' owners in the values' place: what it gives is
each query's attention, summed by owner. So masks, windows, caps, sinks and kernels need no word here. Eager attention shows
its weights instead.

N keys, S queries, H heads, K kv heads, O owners, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ragkv.errors import MethodError
from ragkv.model.attention import switched


class Masses:
    """The attention of a prompt's tokens, summed over layers, mean over heads.

    Args:
        owners: ``[N]`` to whom each slot's key belongs, 0 to O - 1; O behind all of them, -1 in front.
        count: O.

    Attributes:
        slots: ``[S]`` of the queries that are computed now. Whoever runs the model says so.
        seen: how often a layer showed what it attends to.
        behind: layer by layer ``[O]``, what queries of owner O attended to: those behind all that is owned.
    """

    def __init__(self, owners: Tensor, count: int):
        self.slots: Tensor = owners[:0]
        self.seen: int = 0
        self.behind: list[Tensor] = []
        self._owners, self._count = owners, count
        self._sums = torch.zeros(len(owners), count, dtype=torch.float32, device=owners.device)
        self._marks: dict[Any, Tensor] = {}

    def mean(self, layers: int, slots: slice) -> Tensor:
        """``[T, O]`` fp32 of T slots, the mean over so many layers; zeros for tokens that were not computed.

        Raises:
            MethodError: not every layer showed what it attends to.
        """
        if not self.seen or self.seen % layers:
            raise MethodError(
                f"this model's attention is not open to view ({layers} layers showed it {self.seen} times), so no method that goes "
                "by what chunks attend to runs on it"
            )
        return self._sums[slots] / layers

    def take(self, attend: Callable[[Tensor], Tensor], values: Tensor) -> None:
        """One layer.

        Args:
            attend: gives ``[1, S, H, D]`` for values ``[1, K, N, D]``.
            values: the layer's own.
        """
        _, heads, keys, width = values.shape
        parts = [
            attend(self._marked(values, width, first)[:keys].expand(1, heads, -1, -1))[0].float().mean(1)
            for first in range(0, self._count, width)
        ]
        self._add(torch.cat(parts, 1)[:, : self._count])

    def take_weights(self, weights: Tensor) -> None:
        """One layer's weights ``[1, H, S, N]``."""
        own = self._owners[: weights.shape[3]].to(weights.device)
        marks = torch.arange(self._count, device=weights.device) == own[:, None]
        self._add(weights[0].float().mean(0) @ marks.float())

    def _add(self, sums: Tensor) -> None:
        sums = sums.to(self._sums.device)
        self._sums[self.slots] += sums
        self.behind.append(sums[self._owners[self.slots] == self._count].sum(0))
        self.seen += 1

    def _marked(self, like: Tensor, width: int, first: int) -> Tensor:
        """``[N, D]`` one at the owner's place among those from ``first`` on."""
        kind = like.dtype, like.device, width, first
        if kind not in self._marks:
            owners = torch.arange(first, first + width, device=self._owners.device)
            self._marks[kind] = (self._owners[:, None] == owners).to(like.device, like.dtype)
        return self._marks[kind]


@contextmanager
def attending(layers: Iterable[nn.Module], config: PreTrainedConfig, masses: Masses | None) -> Iterator[None]:
    """Take what every layer attends to, for one turn, with whatever attention the model has just now.

    Args:
        layers: of the decoder.
        config: the model's text config.
        masses: takes it; ``None``: nobody does.
    """
    loaded = config._attn_implementation
    if masses is None:
        yield
    elif loaded in ALL_ATTENTION_FUNCTIONS:
        twice = _Twice(ALL_ATTENTION_FUNCTIONS[loaded], masses)
        with switched(config, "attending", twice, ALL_MASK_ATTENTION_FUNCTIONS[loaded]):
            yield
    else:
        hooks = [child.register_forward_hook(_weights_to(masses)) for layer in layers for child in layer.children()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Twice:
    """An attention function that shows what it attends to."""

    def __init__(self, attend: Callable[..., tuple[Tensor, Any]], masses: Masses):
        self._attend, self._masses = attend, masses

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        self._masses.take(lambda marks: self._attend(module, query, key, marks, *args, **kwargs)[0], value)
        return self._attend(module, query, key, value, *args, **kwargs)


def _weights_to(masses: Masses) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.dim() == 4:
            masses.take_weights(weights)

    return hook
