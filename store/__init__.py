"""Tiers that keep chunks' KV: a block pool on the GPU, CPU memory, LMDB on disk, under an eviction policy, and a shared pool."""

from __future__ import annotations

from ragkv.store.batch import Batch
from ragkv.store.keys import chunk_key
from ragkv.store.policy import Policy
from ragkv.store.profile import CostProfile
from ragkv.store.rates import Loading, Rates
from ragkv.store.remote import RemoteTier
from ragkv.store.source import Asking
from ragkv.store.stats import Moved, StoreStats
from ragkv.store.target import Target
from ragkv.store.terms import Item
from ragkv.store.tiered import TieredStore

__all__ = [
    "Asking",
    "Batch",
    "CostProfile",
    "Item",
    "Loading",
    "Moved",
    "Policy",
    "Rates",
    "RemoteTier",
    "StoreStats",
    "Target",
    "TieredStore",
    "chunk_key",
]
