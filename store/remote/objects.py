"""A pool in an object store, by obstore: S3 and what speaks like it, Google Cloud Storage, Azure, a folder, memory."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

from ragkv.errors import MissingPackageError, StoreError
from ragkv.store.remote.pool import Pool, PoolError, shown

_RETRIES = 2
_REQUEST_S = 60.0  # of one that goes on
_LISTED = 1000
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")

Answer = TypeVar("Answer")


class ObjectPool(Pool):
    """Objects below a prefix.

    Requests run on a loop in a thread of its own: whoever waits for one waits in Python, and may stop to.

    Args:
        store: one of ``obstore.store``'s. It retries by itself, and should give up soon (``client_options``, ``retry_config``).
        name: what messages call it.
        quick: it is in this machine.
        requests: how many reads may be on their way at once.
    """

    forks = False  # obstore's threads are the parent's
    _memories: ClassVar[dict[str, Any]] = {}

    def __init__(self, store: Any, name: str, *, quick: bool = False, requests: int = 16) -> None:
        super().__init__(name, requests)
        self.quick = quick
        self._client, self._store = _obstore(), store
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @classmethod
    def open(cls, url: str, limit_s: float, requests: int) -> ObjectPool:
        """See :func:`ragkv.store.remote.opening.open_pool`. A stalled answer is given up after ``limit_s``."""
        client, name = _obstore(), shown(url)
        scheme = url.partition("://")[0].lower()
        try:
            if scheme == "memory":
                store = cls._memories.setdefault(url, client.store.MemoryStore())
            elif scheme == "file":
                store = client.store.from_url(url, mkdir=True)
            else:
                store = client.store.from_url(
                    url,
                    client_options={
                        "allow_http": _plain_http(),
                        "connect_timeout": timedelta(seconds=limit_s),
                        "read_timeout": timedelta(seconds=limit_s),
                        "timeout": timedelta(seconds=_REQUEST_S),
                    },
                    retry_config={
                        "max_retries": _RETRIES,
                        "retry_timeout": timedelta(seconds=limit_s),
                        "backoff": {
                            "init_backoff": timedelta(seconds=0.05),
                            "max_backoff": timedelta(seconds=1),
                            "base": 2,
                        },
                    },
                )
        except (client.exceptions.BaseError, ValueError, TypeError, OSError) as error:
            raise StoreError(
                f"{name} cannot be opened: {_reason(error)}"
            ) from None  # the cause may tell what the URL holds
        return cls(store, name, quick=scheme in ("memory", "file"), requests=requests)

    def read(self, name: str, start: int, stop: int) -> Any:
        """See :class:`Pool`."""
        try:
            return self._wait(lambda: self._client.get_range_async(self._store, name, start=start, end=stop))
        except FileNotFoundError:
            return None
        except PoolError:
            size = self._size(name)  # stores do not say alike that a range begins behind the end
            if size is not None and size > start:
                raise
            return None if size is None else b""

    def write(self, name: str, data: bytes | bytearray, lifetime_s: float) -> None:
        """See :class:`Pool`. Large ones in parts, several at once. It does not go by itself: give the bucket a rule for that."""
        self._wait(lambda: self._client.put_async(self._store, name, data))

    def delete(self, name: str) -> None:
        """See :class:`Pool`."""
        try:
            self._wait(lambda: self._client.delete_async(self._store, name))
        except FileNotFoundError:
            pass

    def there(self, name: str) -> bool:
        """See :class:`Pool`."""
        return self._size(name) is not None

    def names(self) -> Iterator[tuple[str, int]]:
        """See :class:`Pool`."""
        listed = self._client.list(self._store, chunk_size=_LISTED)
        while True:
            try:
                page = self._wait(listed.__anext__)
            except StopAsyncIteration:
                return
            yield from ((item["path"], item["size"]) for item in page)

    def after_fork(self) -> None:
        """See :class:`Pool`."""
        super().after_fork()
        self._lock, self._closed = threading.Lock(), True

    def close(self) -> None:
        """See :class:`Pool`."""
        super().close()
        with self._lock:
            self._closed = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._stop, self._loop)
                self._loop = None

    def _size(self, name: str) -> int | None:
        try:
            size: int = self._wait(lambda: self._client.head_async(self._store, name))["size"]
        except FileNotFoundError:
            return None
        return size

    def _wait(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Runs a request to its end.

        Raises:
            FileNotFoundError: there is no such object.
            PoolError: it failed.
        """

        async def asked() -> Answer:
            return await ask()

        with self._lock:
            if self._closed:
                raise PoolError(f"{self.name} is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="ragkv-pool-loop", daemon=True).start()
            future = asyncio.run_coroutine_threadsafe(asked(), self._loop)
        try:
            return future.result(_REQUEST_S)
        except FutureTimeoutError as error:
            future.cancel()
            raise PoolError(f"{self.name} did not answer within {_REQUEST_S:g} s") from error
        except CancelledError as error:
            raise PoolError(f"{self.name} was closed") from error
        except (FileNotFoundError, StopAsyncIteration):
            raise
        except Exception as error:
            raise PoolError(f"{self.name}: {_reason(error)}") from error

    @staticmethod
    def _stop(loop: asyncio.AbstractEventLoop) -> None:
        """On the loop: ends what is on its way, then the loop."""
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.call_soon(loop.stop)


def _plain_http() -> bool:
    """Whether the environment names an endpoint without encryption: obstore looks there only where it is given no options."""
    allowed = any(os.environ.get(name, "").lower() in ("1", "true") for name in ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP"))
    return allowed or any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise MissingPackageError(
            f"object stores need the package obstore: pip install 'ragkv[remote]' ({error})"
        ) from error
    return obstore


def _reason(error: BaseException) -> str:
    """What went wrong in one line: behind it obstore tells all that it knows."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
