"""The terms on which an entry is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ragkv.chunk import ChunkKV
from ragkv.errors import StoreError

_LONGEST_NAME = 511  # of LMDB's keys


class Item(NamedTuple):
    """One chunk to put: its key, its KV, the seconds that its prefill took, and what whoever puts it knows it by."""

    key: bytes
    kv: ChunkKV
    cost_s: float = 0.0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """What whoever puts an entry says of it.

    Attributes:
        namespace: whose it is, for quotas: a name, or the id that the books have for one.
        lifetime_s: seconds for which it may be read.
        cost_s: seconds that computing it took.
        uses: how often it was used before, in another folder.
    """

    namespace: str | bytes = ""
    lifetime_s: float = math.inf
    cost_s: float = 0.0
    uses: int = 0

    def __post_init__(self) -> None:
        if not self.lifetime_s > 0:
            raise StoreError(f"a lifetime is more than 0 seconds, got {self.lifetime_s}")
        if not 0 <= self.cost_s < math.inf:
            raise StoreError(f"a cost is at least 0 seconds and finite, got {self.cost_s}")


def check_facts(facts: Mapping[str, bytes]) -> None:
    """Raises StoreError where small values by name cannot be kept."""
    for name, value in facts.items():
        try:
            fits = isinstance(value, bytes) and 0 < len(name.encode()) <= _LONGEST_NAME
        except (AttributeError, UnicodeEncodeError):
            fits = False
        if not fits:
            raise StoreError(f"a fact is bytes, its name 1 to {_LONGEST_NAME} bytes, got {name!r:.80}: {value!r:.80}")
