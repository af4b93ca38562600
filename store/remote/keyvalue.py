# ruff: noqa: D102 - methods without a docstring keep the contract of pool.Pool
"""A pool in Redis or Valkey, by redis-py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

from ragkv.errors import StoreError
from ragkv.store.remote.pool import ClosedError, Pool, PoolError, needing, shown

_RETRIES = 2
_MOST_VALUE = 512 << 20  # Redis' own limit
_SCANNED = 1000
_LONGEST_S = 1e12  # of lifetimes; Redis counts milliseconds in 63 bits, and refuses longer ones

Answer = TypeVar("Answer")


class RedisPool(Pool):
    """Values whose keys begin alike. They go when their lifetime ends, or when the server evicts them.

    Args:
        client: a ``redis.Redis``.
        name: what messages call it.
        prefix: what keys begin with.
        requests: how many reads may be on their way at once.
    """

    quick = True
    most_bytes = _MOST_VALUE

    def __init__(self, client: Any, name: str, *, prefix: str = "ragkv:", requests: int = 16) -> None:
        super().__init__(name)
        self._client, self._prefix, self._requests = client, prefix, requests
        self._threads = ThreadPoolExecutor(requests, "ragkv-pool")

    @classmethod
    def open(cls, url: str, limit_s: float, requests: int) -> RedisPool:
        """See :func:`ragkv.store.remote.opening.open_pool`; ``?prefix=`` names what keys begin with."""
        redis, name = _redis(), shown(url)
        try:
            parts = urlsplit(url)
            if parts.fragment or not (parts.path.strip("/") or "0").isdecimal():
                raise ValueError("the client would leave that out, and take the database 0")
            query = parse_qs(parts.query)
            prefix = query.pop("prefix", ["ragkv:"])[-1]
            query.pop("decode_responses", None)  # KV are no text
            rest = urlencode(query, doseq=True)
            scheme = parts.scheme.lower().replace("valkey", "redis")
            connections = redis.BlockingConnectionPool.from_url(  # where there are few, requests wait for one
                urlunsplit(parts._replace(scheme=scheme, query=rest)),
                socket_timeout=limit_s,
                socket_connect_timeout=limit_s,
                timeout=limit_s,
                retry=redis.retry.Retry(
                    redis.backoff.ExponentialBackoff(cap=0.5, base=0.05), _RETRIES, (redis.exceptions.ConnectionError,)
                ),
            )
            connections.make_connection()  # connects to nothing: it says what settings there are
        except (ValueError, TypeError):
            raise StoreError(
                f"{name} cannot be opened: a pool in Redis is redis://HOST:PORT/NUMBER of its database, and behind a question mark "
                "prefix=TEXT or what redis-py takes"
            ) from None  # the text may tell the URL
        return cls(redis.Redis.from_pool(connections), name, prefix=prefix, requests=requests)

    def begin(self, name: str, start: int, stop: int) -> Future[Any]:
        try:
            return self._threads.submit(self._range, name, start, stop)
        except RuntimeError as error:
            raise ClosedError(f"{self.name} is closed") from error

    def write(self, name: str, data: bytes | bytearray, lifetime_s: float) -> None:
        lifetime_ms = None if lifetime_s > _LONGEST_S else max(1, int(lifetime_s * 1000))
        self._wait(lambda: self._client.set(self._prefix + name, memoryview(data), px=lifetime_ms))

    def delete(self, *names: str) -> None:
        """See :class:`Pool`. One round trip."""
        self._wait(lambda: self._client.unlink(*(self._prefix + name for name in names)))

    def heads(self, names: Sequence[str], size: int) -> dict[str, Any]:
        """See :class:`Pool`. One round trip."""
        heads = self._piped(names, lambda pipe, key: pipe.getrange(key, 0, size - 1))
        return {name: head for name, head in zip(names, heads, strict=True) if head}

    def which(self, names: Sequence[str]) -> set[str]:
        """See :class:`Pool`. One round trip."""
        there = self._piped(names, lambda pipe, key: pipe.exists(key))
        return {name for name, count in zip(names, there, strict=True) if count}

    def names(self, below: str = "") -> Iterator[tuple[str, int]]:
        pattern, cursor = re.sub(r"[*?[\\]", r"\\\g<0>", self._prefix + below), 0
        while True:
            cursor, keys = self._wait(partial(self._client.scan, cursor, match=pattern + "*", count=_SCANNED))
            names = [key.decode(errors="replace").removeprefix(self._prefix) for key in keys]
            yield from zip(names, self._piped(names, lambda pipe, key: pipe.strlen(key)), strict=True)
            if not cursor:
                return

    def after_fork(self) -> None:
        self._threads = ThreadPoolExecutor(self._requests, "ragkv-pool")

    def close(self) -> None:
        """See :class:`Pool`. What is on its way has its time limit."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _range(self, name: str, start: int, stop: int) -> Any:
        data = self._wait(lambda: self._client.getrange(self._prefix + name, start, stop - 1))
        return data or (b"" if start and self.which([name]) else None)

    def _piped(self, names: Sequence[str], ask: Callable[[Any, str], object]) -> list[Any]:
        def run() -> list[Any]:
            pipe = self._client.pipeline(transaction=False)
            for name in names:
                ask(pipe, self._prefix + name)
            return list(pipe.execute())

        return self._wait(run) if names else []

    def _wait(self, ask: Callable[[], Answer]) -> Answer:
        try:
            return ask()
        except (_redis().exceptions.RedisError, OSError) as error:
            raise PoolError(f"{self.name}: {type(error).__name__}: {str(error)[:300]}") from error


def _redis() -> Any:
    with needing("Redis and Valkey need the package redis: pip install 'ragkv[redis]'"):
        import redis
        import redis.backoff
        import redis.retry
    return redis
