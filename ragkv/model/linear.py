"""Linear layers of a few rows on a CPU.

``X W^T`` of M rows is written for many of them: MKL takes twice as long for two rows as for one, and longer than for
``(W X^T)^T``, which is the same numbers in another order. Where a processor shows that, passes of few rows compute it so: next
tokens of several answers, and the few tokens that a method recomputes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

#: Rows from which on nothing is won, on an AVX2 processor.
_MOST_ROWS = 128
#: Numbers of a weight below which it lies in the processor's cache, and any order will do.
_SMALL = 1 << 18
#: How much faster it has to be, over weights of so many rows and columns.
_FASTER, _TRIED = 1.15, 2048


def few_rows(rows: int, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """A block in which this thread's linear layers of so many rows are computed in the faster order; the model is not changed."""
    if device.type == "cpu" and dtype == torch.float32 and 1 < rows <= _MOST_ROWS and pays(torch.get_num_threads()):
        return _Turned()
    return nullcontext()


def wide(layers: nn.Module) -> bool:
    """Whether any of their weights is so large that the order makes a difference: watching for it slows smaller ones down."""
    return any(weight.dim() > 1 and weight.shape[-2:].numel() >= _SMALL for weight in layers.parameters())


@cache
def pays(threads: int) -> bool:
    """Whether the other order is faster here: tried once, in some ten milliseconds."""
    # Nothing is drawn: whoever seeds PyTorch's generator gets the numbers of that seed.
    weight, given = (torch.ones(rows, _TRIED, dtype=torch.float32, device="cpu") for rows in (_TRIED, 8))
    took: dict[Callable[[Tensor, Tensor], Tensor], list[float]] = {linear: [], turned: []}
    for _ in range(4):
        for way, seconds in took.items():
            begin = perf_counter()
            way(given, weight)
            seconds.append(perf_counter() - begin)
    return min(took[linear]) > _FASTER * min(took[turned])


def turned(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear` of ``given [..., K]`` by ``(weight [N, K] given^T)^T``; returns ``[..., N]``."""
    rows = given.reshape(-1, given.shape[-1])
    out = torch.mm(weight, rows.t()).t().contiguous().view(*given.shape[:-1], weight.shape[0])
    return out if bias is None else out.add_(bias)


class _Turned(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is linear and not kwargs and _fits(*args):
            return turned(*args)
        return func(*args, **(kwargs or {}))


def _fits(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype == given.dtype == torch.float32
    few = 1 < given.numel() // max(1, given.shape[-1]) <= _MOST_ROWS
    return plain and few and weight.dim() == 2 and weight.numel() >= _SMALL and weight.is_contiguous()
