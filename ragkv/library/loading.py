"""How fast KV come from each tier: a sample of the model's shapes is stored and placed into a prompt, as a question would.

L layers, H kv heads, T tokens, D head_dim.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from ragkv.chunk import Chunk, digest
from ragkv.errors import StoreError
from ragkv.fusion.layout import lay_out
from ragkv.fusion.placement import Placement
from ragkv.model.cache import random_kv
from ragkv.store import Item, Loading, TieredStore
from ragkv.store.rates import PAGE_CACHE

if TYPE_CHECKING:
    from ragkv.library.documents import Documents
    from ragkv.model.decoder import Decoder

logger: logging.Logger = logging.getLogger(__name__)

_CHUNKS, _CHUNK_TOKENS, _FIRST_TOKENS = 8, 256, 16
_MOST_BYTES = 64 << 20
_FOLDER = "measuring-"
_STALE_S = 3600


def measure_loading(documents: Documents, limit_s: float) -> dict[str, Loading]:
    """The rates of memory, of the GPU's where there is one, and of the store's disk, with and without the page cache.

    Args:
        documents: whose model and store they are.
        limit_s: seconds that storing the sample on disk may take; its first two chunks are always stored.
    """
    decoder, store = documents.reader.decoder, documents.store
    sample, (codec, cpu_codec) = Sample(decoder), store.codecs
    room, measured = 4 * sample.nbytes + (1 << 20), dict[str, Loading]()
    if decoder.device.type == "cuda":
        with TieredStore(gpu_bytes=room, cpu_bytes=room, device=decoder.device) as gpu:
            sample.put(gpu)
            measured["gpu"] = sample.loading(gpu, "gpu")
    with TieredStore(cpu_bytes=room, codec=codec, cpu_codec=cpu_codec) as memory:
        sample.put(memory)
        measured["cpu"] = sample.loading(memory, "cpu")
    if store.path is None or store.readonly:
        return measured
    try:
        with _folder(store.path) as folder, TieredStore(folder, cpu_bytes=0, disk_bytes=room, codec=codec) as disk:
            sample.put(disk, limit_s)
            read = {"disk": sample.loading(disk, "disk", folder / "data.mdb"), PAGE_CACHE: sample.loading(disk, "disk")}
        return measured | read
    except (StoreError, OSError) as error:  # full, say
        logger.warning("the disk is not measured: nothing can be written to %s: %s", store.path, str(error))
        return measured


class Sample:
    """Chunks of a model's shapes, the first of them short."""

    def __init__(self, decoder: Decoder):
        self.decoder: Decoder = decoder
        token_bytes = sum(spec.token_bytes for spec in decoder.specs)
        most = _MOST_BYTES // token_bytes if decoder.max_positions is None else decoder.max_positions - _FIRST_TOKENS
        long = max(1, min(_CHUNK_TOKENS, most // _CHUNKS, _MOST_BYTES // token_bytes // 2))
        count = max(2, min(1 + _CHUNKS, _MOST_BYTES // (token_bytes * long)))
        lengths = [min(_FIRST_TOKENS, long), *[long] * (count - 1)]
        self.nbytes: int = token_bytes * sum(lengths)
        self.chunks: list[Chunk] = [Chunk((number,) * length) for number, length in enumerate(lengths)]
        self.keys: dict[Chunk, bytes] = {chunk: digest(b"sample", [number]) for number, chunk in enumerate(self.chunks)}
        self._kv = random_kv(decoder.specs, long)

    def put(self, store: TieredStore, limit_s: float = float("inf")) -> None:
        """Stores the chunks one by one, as long as there is time."""
        begin = perf_counter()
        for number, chunk in enumerate(self.chunks):
            if number > 1 and perf_counter() - begin > limit_s:
                self.chunks = self.chunks[:number]
                break
            item = Item(self.keys[chunk], self._kv.first(len(chunk)))
            store.put_many([item], rotations=self.decoder.rotations)

    def loading(self, store: TieredStore, tier: str, file: Path | None = None) -> Loading:
        """A tier's rate, and what a prompt takes besides: from a few tokens and from many.

        Args:
            store: holds the sample.
            tier: of it.
            file: read once, and without the page cache; by default the best of three times counts.
        """
        self._load(store, self.chunks[:1])  # the first run of a process is slow
        first, times = (1, 1) if file is not None and len(self.chunks) > 2 else (0, 1 if file else 3)
        if file is not None:
            _forget_pages(file)
        short, long = self.chunks[first : first + 1], self.chunks[first + 1 :]
        few_s, many_s = (min(self._load(store, chunks) for _ in range(times)) for chunks in (short, long))
        few, many = (sum(map(len, chunks)) for chunks in (short, long))
        per_token = (many_s - few_s) / (many - few) if many > few else 0.0
        if per_token <= 0:
            per_token = many_s / many
        token_bytes = store.sizes(self.keys[chunk] for chunk in long)[tier] / many
        return Loading(token_bytes / per_token, token_bytes, max(0.0, few_s - few * per_token))

    def _load(self, store: TieredStore, chunks: Sequence[Chunk]) -> float:
        """Seconds until chunks stand in a prompt's cache, with their keys turned."""
        layout = lay_out((0,), (), chunks, (0,), self.decoder.device)
        cache, keys = self.decoder.cache(layout.tokens), {chunk: self.keys[chunk] for chunk in chunks}
        self._wait()
        begin = perf_counter()
        with store.read(list(keys.values())) as batch:
            placement = Placement(self.decoder, cache, layout, batch, keys, {})
            placement.ahead()
            placement.upto(len(self.decoder.layers) - 1)
            self._wait()
        return perf_counter() - begin

    def _wait(self) -> None:
        for spec in self.decoder.specs:
            if spec.device.type == "cuda":
                torch.cuda.current_stream(spec.device).synchronize()  # of the device: not while a graph is captured


@contextmanager
def _folder(beside: Path) -> Iterator[Path]:
    """A folder on the disk of another one, for a moment. What a killed process has left goes."""
    for left in beside.glob(f"{_FOLDER}*"):
        with suppress(FileNotFoundError):  # another process may be done with its own
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
    made = tempfile.mkdtemp(prefix=_FOLDER, dir=beside)
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _forget_pages(file: Path) -> None:
    """Has the system drop what it holds of a file, where it can."""
    advise: Callable[..., object] | None = getattr(os, "posix_fadvise", None)
    if advise is not None:
        handle = os.open(file, os.O_RDONLY)
        try:
            advise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
