"""Documents read by many machines, their KV left in a shared pool: nobody else has to read them (docs/scale.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ragkv.distributed.results import Precomputed

if TYPE_CHECKING:
    from ragkv.distributed.precomputing import precompute

__all__ = ["Precomputed", "precompute"]


def __getattr__(name: str) -> Any:
    if name != "precompute":
        raise AttributeError(f"module 'ragkv.distributed' has no attribute {name!r}")
    from ragkv.distributed.precomputing import precompute  # what a cluster's smaller processes do without

    return precompute
