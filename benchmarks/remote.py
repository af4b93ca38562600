"""Reading chunks from a pool through the store, against its plain client reading equal objects, in alternating rounds.

    python benchmarks/remote.py [URL ...] [--rounds N] [--json FILE]

URLs are as for ``TieredStore(remote=)``; by default a folder. A few objects are put there, and deleted at the end.
Both sides ask for several at once; the store also verifies and places what comes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from ragkv.chunk import ChunkKV
from ragkv.store import RemoteTier, TieredStore, chunk_key
from ragkv.store.remote.records import name_of

LAYERS, HEADS, DIM, TOKENS, CHUNKS = 24, 2, 64, 256, 8  # a Qwen2 of 0.5B in fp32, 8 chunks: 48 MiB

REQUESTS, RANGE_BYTES = 16, 4 << 20


def make_kv(seed: int) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)

    def tensors() -> list[torch.Tensor]:
        return [torch.randn(HEADS, TOKENS, DIM, generator=generator) for _ in range(LAYERS)]

    return ChunkKV(tensors(), tensors(), 0)


def plain_client(url: str) -> Callable[[str], Any]:
    """Reads a whole object by its name."""
    if url.startswith("mooncake"):
        from mooncake.store import MooncakeDistributedStore

        parts, size = urlsplit(url), 64 << 20
        client = MooncakeDistributedStore()
        assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, size, "tcp", "", parts.netloc) == 0
        return lambda name: memoryview(client.get_buffer(f"{parts.path.strip('/') or 'ragkv'}/{name}"))
    if url.startswith("redis"):
        import redis

        prefix = parse_qs(urlsplit(url).query).get("prefix", ["ragkv:"])[-1]
        client = redis.Redis.from_url(url.partition("?")[0])
        return lambda name: client.get(prefix + name)
    import obstore.store

    options: dict[str, Any] = {} if url.startswith("file") else {"client_options": {"allow_http": True}}
    store = obstore.store.from_url(url, **options)
    return lambda name: obstore.get(store, name).bytes()


def measured(url: str, rounds: int, range_bytes: int) -> dict[str, float]:
    keys = [chunk_key("benchmarks/remote.py", [number], b"") for number in range(CHUNKS)]
    with TieredStore(cpu_bytes=1 << 30, remote=url) as store:
        store.put_many([(key, make_kv(number), 0.1) for number, key in enumerate(keys)])
        store.flush()
    read = plain_client(url)
    # So little memory that whatever is read comes from the pool.
    with (
        TieredStore(cpu_bytes=1, remote=RemoteTier(url, requests=REQUESTS, range_bytes=range_bytes)) as store,
        ThreadPoolExecutor(1 if url.startswith("mooncake") else REQUESTS) as threads,  # whose client is faster so
    ):

        def plainly() -> tuple[float, int]:
            begin = time.perf_counter()
            size = sum(len(data) for data in threads.map(read, map(name_of, keys)))
            return time.perf_counter() - begin, size

        def by_layer() -> tuple[float, float]:
            begin, first = time.perf_counter(), 0.0
            with store.read(keys) as batch:
                assert set(batch.tiers) == {"remote"}
                for layer in range(LAYERS):
                    for index in range(CHUNKS):
                        batch.layer(index, layer)
                    first = first or time.perf_counter() - begin
            return time.perf_counter() - begin, first

        by_layer(), plainly()
        pairs = [(by_layer(), plainly()) for _ in range(rounds)]
        size = pairs[0][1][1]
        store.remove_many(keys)
        store.flush()
    return {
        "bytes": size,
        "rounds": rounds,
        "store_bytes_per_s": size / statistics.median(ours for (ours, _), _ in pairs),
        "client_bytes_per_s": size / statistics.median(theirs for _, (theirs, _) in pairs),
        "store / client": statistics.median(theirs / ours for (ours, _), (theirs, _) in pairs),
        "first layer / all": statistics.median(first / ours for (ours, first), _ in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="*", metavar="URL")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--range-bytes", type=int, default=RANGE_BYTES, help="of one request of the store's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            url if args.urls else "a folder": measured(url, args.rounds, args.range_bytes)
            for url in args.urls or [f"file://{folder}/pool"]
        }
    for url, found in results.items():
        print(
            f"{url}: store {found['store_bytes_per_s'] / 1e6:.0f} MB/s, client {found['client_bytes_per_s'] / 1e6:.0f} MB/s, "
            f"ratio {found['store / client']:.2f}; the first layer of all chunks after {found['first layer / all']:.0%} of the time"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
