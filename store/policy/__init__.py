"""Eviction policies, one a file."""

from __future__ import annotations

from ragkv.store.named import named
from ragkv.store.policy.base import Policy, Usage
from ragkv.store.policy.gdsf import GDSF
from ragkv.store.policy.lfu import LFU
from ragkv.store.policy.lrfu import LRFU
from ragkv.store.policy.lru import LRU
from ragkv.store.policy.pgdsf import PGDSF

POLICIES: dict[str, type[Policy]] = {kind.name: kind for kind in (PGDSF, LRFU, LRU, LFU, GDSF)}


def get_policy(policy: str | Policy) -> Policy:
    """The policy of that name, or the policy itself.

    Raises:
        StoreError: no policy has that name.
    """
    return named("policy", policy, Policy, POLICIES)


__all__ = ["GDSF", "LFU", "LRFU", "LRU", "PGDSF", "POLICIES", "Policy", "Usage", "get_policy"]
