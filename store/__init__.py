"""Tiers that keep chunks' KV: CPU memory and LMDB on disk, under an eviction policy."""

from __future__ import annotations

from ragkv.store.batch import Batch
from ragkv.store.keys import chunk_key
from ragkv.store.policy import Policy
from ragkv.store.tiered import StoreStats, TieredStore

__all__ = ["Batch", "Policy", "StoreStats", "TieredStore", "chunk_key"]
