"""The terms on which an entry is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ragkv.chunk import ChunkKV
from ragkv.errors import StoreError, checked_namespace, half_a_pair, instance

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
        if not isinstance(self.namespace, bytes):
            checked_namespace(self.namespace)
        for name, seconds in {"lifetime_s": self.lifetime_s, "cost_s": self.cost_s}.items():
            instance(name, seconds, int | float, "a number of seconds")
        if not self.lifetime_s > 0:
            raise StoreError(f"a lifetime is more than 0 seconds, got {self.lifetime_s}")
        if not 0 <= self.cost_s < math.inf:
            raise StoreError(f"a cost is at least 0 seconds and finite, got {self.cost_s}")


def check_facts(facts: Mapping[str, bytes]) -> None:
    """Raises StoreError where small values by name cannot be kept."""
    instance("facts", facts, Mapping, "small values by name")
    for name, value in facts.items():
        checked_names([name])
        if not isinstance(value, bytes) or not 0 < len(name.encode()) <= _LONGEST_NAME:
            raise StoreError(f"a fact is bytes, its name 1 to {_LONGEST_NAME} bytes, got {name!r:.80}: {value!r:.80}")


def checked_names(names: Iterable[str]) -> list[str]:
    """Names of facts, as a list.

    Raises:
        StoreError: something else is among them, or it is one text.
    """
    listed = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    for name in listed:
        if name is names or not isinstance(name, str) or half_a_pair(name):
            raise StoreError(f"facts are named by text, in a list where several are, got {name!r:.80}")
    return listed
