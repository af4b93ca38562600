"""A shared pool behind the other tiers: an object store, Redis, or Mooncake's store.

What its clients need is loaded when a pool is opened.
"""

from __future__ import annotations

from ragkv.store.remote.tier import RemoteTier

__all__ = ["RemoteTier"]
