"""Which pool a URL means. Their clients are loaded when one is opened."""

from __future__ import annotations

from ragkv.errors import StoreError
from ragkv.store.remote.keyvalue import RedisPool
from ragkv.store.remote.mooncake import MooncakePool
from ragkv.store.remote.objects import ObjectPool
from ragkv.store.remote.pool import Pool, shown


def open_pool(url: str, limit_s: float, requests: int) -> Pool:
    """The pool that a URL means.

    Raises:
        StoreError: there is no such kind of pool, or the URL is not one.
        MissingPackageError: its client is not installed.
    """
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    if scheme in ("redis", "rediss", "valkey", "valkeys"):
        return RedisPool.open(url, limit_s, requests)
    if scheme in ("s3", "gs", "az", "file", "memory"):
        return ObjectPool.open(url, limit_s, requests)
    if scheme == "mooncake":
        return MooncakePool.open(url, limit_s, requests)
    raise StoreError(
        f"a pool is s3://BUCKET/PREFIX, gs://, az://, file:///FOLDER, memory://NAME, redis://HOST, rediss:// or "
        f"mooncake://MASTER, got {shown(url)!r}"
    )
