# ruff: noqa: D102 - methods without a docstring keep the contract of pool.Pool
"""A pool in an object store, by obstore: S3 and what speaks like it, Google Cloud Storage, Azure, a folder, memory."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, ClassVar, Self, TypeVar

from ragkv.errors import StoreError
from ragkv.store.remote.loop import Loop
from ragkv.store.remote.pool import GoneError, Pool, PoolError, needing, shown

logger: logging.Logger = logging.getLogger("ragkv.store")

_RETRIES = 2
_REQUEST_S = 60.0  # of one that goes on
_WRITE_S = 30.0  # what is sent may take long before an answer comes
_LISTED = 1000
_SMALL_BYTES = 64 << 10
# What a server answers that does not know a request; 403 is about who asks.
_REFUSED = re.compile(r"status code: (400|404|405|501)")
_PLAIN = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")

Answer = TypeVar("Answer")


class ObjectPool(Pool):
    """Objects below a prefix.

    Args:
        store: one of ``obstore.store``'s. It retries by itself, and should give up soon (``client_options``, ``retry_config``).
        name: what messages call it.
        writer: the same with more patience, for what is written.
        quick: it is in this machine.
        requests: how many reads may be on their way at once.
    """

    forks = False  # obstore's threads are the parent's
    _memories: ClassVar[dict[str, Any]] = {}

    def __init__(self, store: Any, name: str, *, writer: Any = None, quick: bool = False, requests: int = 16) -> None:
        super().__init__(name)
        self.quick = quick
        self._client, self._store, self._writer = _obstore(), store, writer or store
        # What deletes one object after the other; None while several go at once.
        self._deleter = None if isinstance(store, self._client.store.S3Store) else self._writer
        # What is small does not stand in line behind what is large.
        self._small, self._large = asyncio.Semaphore(requests), asyncio.Semaphore(requests)
        self._loop = Loop()

    @classmethod
    def open(cls, url: str, limit_s: float, requests: int) -> Self:
        """See :func:`ragkv.store.remote.opening.open_pool`. A stalled answer is given up after ``limit_s``."""
        client, name = _obstore(), shown(url)
        scheme = url.partition("://")[0].lower()
        if scheme != "memory" and ("?" in url or "#" in url):  # which the client would leave out, and all behind it
            raise StoreError(
                f"{name} cannot be opened: its URL must have neither '?' nor '#'; a folder's may have %3F and %23"
            )
        if scheme == "file" and not url.partition("://")[2].strip("/"):
            raise StoreError(
                f"{name} cannot be opened: it names no folder, and the root of the file system is none for a pool"
            )
        writer = None
        try:
            if scheme == "memory":
                store = cls._memories.setdefault(url, client.store.MemoryStore())
            elif scheme == "file":
                store = client.store.from_url(url, mkdir=True)
            else:
                store = client.store.from_url(url, **_patience(limit_s))
                writer = client.store.from_url(url, **_patience(max(limit_s, _WRITE_S)))
        except (client.exceptions.BaseError, ValueError, TypeError, OSError) as error:
            raise StoreError(
                f"{name} cannot be opened: {_reason(error)}"
            ) from None  # the cause may tell what the URL holds
        return cls(store, name, writer=writer, quick=scheme in ("memory", "file"), requests=requests)

    def begin(self, name: str, start: int, stop: int) -> Future[Any]:
        return self._loop.begin(self._read(name, start, stop))

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._loop.together():
            yield

    def which(self, names: Sequence[str]) -> set[str]:
        """See :class:`Pool`. As many requests as names, several at once."""
        with self.together():
            begun = [self._loop.begin(self._size(name)) for name in names]
        sizes = self.answers(begun)
        return {name for name, size in zip(names, sizes, strict=True) if size is not None}

    def write(self, name: str, data: bytes | bytearray, lifetime_s: float) -> None:
        """See :class:`Pool`. Large ones in parts, several at once. It does not go by itself: give the bucket a rule for that."""
        self._wait(self._ask(self._client.put_async, self._writer, name, data, turns=self._large))

    def delete(self, *names: str) -> None:
        """See :class:`Pool`. S3 alone deletes several at once, and does not mind those that are not there; where what speaks like
        it refuses that, they go one by one from then on.
        """
        deleter = self._deleter
        if deleter is None:
            try:
                self._wait(self._ask(self._client.delete_async, self._writer, list(names)))
                return
            except (FileNotFoundError, PoolError) as error:
                # S3 says 404 of no object here: whoever does so does not know the request.
                if not isinstance(error, FileNotFoundError) and not _REFUSED.search(str(error)):
                    raise
                deleter = _one_by_one(self._writer)
        with self.together():
            begun = [self._loop.begin(self._gone(deleter, name)) for name in names]
        for each in begun:
            self.answer(each)
        if self._deleter is None:
            self._deleter = deleter
            logger.warning("%s: deleting several objects in one request is refused, they go one by one", self.name)

    def names(self, below: str = "") -> Iterator[tuple[str, int]]:
        listed = self._client.list(self._store, prefix=below or None, chunk_size=_LISTED)
        while page := self._wait(self._page(listed)):
            yield from ((item["path"], item["size"]) for item in page)

    def after_fork(self) -> None:
        """See :class:`Pool`. It is closed."""
        self._loop.after_fork()

    def close(self) -> None:
        self._loop.close()

    def _wait(self, request: Coroutine[Any, Any, Answer]) -> Answer:
        return self.answer(self._loop.begin(request))

    async def _read(self, name: str, start: int, stop: int) -> Any:
        try:
            turns = self._large if stop - start > _SMALL_BYTES else self._small
            return await self._ask(self._client.get_range_async, self._store, name, start=start, end=stop, turns=turns)
        except FileNotFoundError:
            return None
        except PoolError:
            size = await self._size(name)  # stores do not say alike that a range begins behind the end
            if size is not None and size > start:
                raise
            return None if size is None else b""

    async def _gone(self, deleter: Any, name: str) -> None:
        with suppress(FileNotFoundError):
            await self._ask(self._client.delete_async, deleter, name)

    async def _size(self, name: str) -> int | None:
        try:
            size: int = (await self._ask(self._client.head_async, self._store, name))["size"]
        except FileNotFoundError:
            return None
        return size

    async def _page(self, listed: Any) -> Any:
        try:
            return await self._ask(listed.__anext__)
        except StopAsyncIteration:
            return None

    async def _ask(
        self,
        ask: Callable[..., Awaitable[Answer]],
        *args: Any,
        turns: asyncio.Semaphore | None = None,
        **options: Any,
    ) -> Answer:
        """One request, when its turn comes.

        Raises:
            FileNotFoundError: there is no such object.
            PoolError: it failed; a GoneError where it is refused.
        """
        async with turns or self._small:
            try:
                return await ask(*args, **options)
            except (FileNotFoundError, StopAsyncIteration):
                raise
            except self._client.exceptions.PermissionDeniedError as error:  # as of what was moved to an archive
                raise GoneError(f"{self.name}: {_reason(error)}") from error
            except Exception as error:
                raise PoolError(f"{self.name}: {_reason(error)}") from error


def _one_by_one(store: Any) -> Any:
    """The same bucket, whose client sends a request for each object that is deleted."""
    config = {**store.config, "disable_bulk_delete": True}
    more = {name: getattr(store, name) for name in ("prefix", "client_options", "retry_config", "credential_provider")}
    return type(store)(config=config, **more)


def _patience(limit_s: float) -> dict[str, Any]:
    """Options of a client that waits so long for an answer to begin or to go on."""
    return {
        "client_options": {
            "allow_http": _plain_http(),
            "connect_timeout": timedelta(seconds=limit_s),
            "read_timeout": timedelta(seconds=limit_s),
            "timeout": timedelta(seconds=max(limit_s, _REQUEST_S)),
        },
        "retry_config": {
            "max_retries": _RETRIES,
            "retry_timeout": timedelta(seconds=limit_s),
            "backoff": {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=1), "base": 2},
        },
    }


def _plain_http() -> bool:
    """Whether the environment names an endpoint without encryption: obstore looks there only where it is given no options."""
    allowed = any(os.environ.get(name, "").lower() in ("1", "true") for name in _PLAIN)
    return allowed or any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)


def _obstore() -> Any:
    with needing("object stores need the package obstore: pip install 'ragkv[remote]'"):
        import obstore
        import obstore.exceptions
        import obstore.store
    return obstore


def _reason(error: BaseException) -> str:
    """What went wrong in one line: behind it obstore tells all that it knows."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
