"""The store against its limits: ratios within one run. Policies: ``policies.py``; codecs: ``encoded.py``.

    python benchmarks/store.py [--entries N] [--out FOLDER]

Every ratio is taken from alternating rounds of both sides in this process; the median of the rounds is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from timeit import timeit

import torch

from ragkv.chunk import ChunkKV
from ragkv.store import Target, TieredStore, chunk_key
from ragkv.store.books import MemoryBooks
from ragkv.store.planner import Planner
from ragkv.store.policy import get_policy
from ragkv.store.record import SEGMENT_BYTES, checksum
from ragkv.store.terms import Terms

LAYERS, HEADS, DIM, TOKENS, CHUNKS = 24, 2, 64, 256, 8  # a Qwen2 of 0.5B, 8 chunks


def make_kv(seed: int) -> ChunkKV:
    numbers = torch.randn(2, LAYERS, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))
    return ChunkKV(list(numbers[0]), list(numbers[1]), 0)


def key_of(number: int) -> bytes:
    return chunk_key("bench", [number], b"")


def compare(ours: Callable[[], object], limit: Callable[[], object], rounds: int) -> dict[str, float]:
    """Seconds of both sides, and the median of limit / ours over alternating rounds."""
    ours(), limit()
    pairs = [(timeit(ours, number=1), timeit(limit, number=1)) for _ in range(rounds)]
    return {
        "seconds": statistics.median(mine for mine, _ in pairs),
        "limit_seconds": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(theirs / mine for mine, theirs in pairs),
    }


def get_into_prompt(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """A warm get of 8 chunks from LMDB into the prompt's own tensors, against a plain copy of as many bytes."""
    keys, every = [key_of(number) for number in range(CHUNKS)], range(LAYERS)
    prompt = torch.zeros(2, LAYERS, HEADS, CHUNKS * TOKENS, DIM)
    flat, plain = torch.zeros(prompt.numel()), torch.randn(prompt.numel())
    with TieredStore(folder / "get", cpu_bytes=0) as store:
        store.put_many([(key, make_kv(number), 0.1) for number, key in enumerate(keys)])

        def targets(layers: range) -> list[Target]:
            return [Target(prompt[0, layer], prompt[1, layer]) for layer in layers]

        def place(*parts: range) -> None:
            with store.read(keys) as batch:
                for layers in parts:
                    into = targets(layers)
                    for index in range(CHUNKS):
                        batch.place(index, layers, into, index * TOKENS)

        def get() -> None:
            with store.read(keys) as batch:
                for layer in every:
                    for index in range(CHUNKS):
                        batch.layer(index, layer)

        ways: dict[str, Callable[[], object]] = {
            "get into the prompt": lambda: place(every),
            "get into the prompt, layer by layer": lambda: place(*(range(layer, layer + 1) for layer in every)),
            "get as tensors of the store's": get,
        }
        results = {
            f"{way} / plain copy": compare(ours, lambda: flat.copy_(plain), rounds) for way, ours in ways.items()
        }
        results["warm get, processor ms"] = {
            "get": processor_ms(lambda: place(every), rounds),
            "open and close": processor_ms(lambda: store.read(keys).close(), rounds),
            "targets": processor_ms(lambda: targets(every), rounds),
            **{name: processor_ms(work, rounds) for name, work in copies(plain, flat).items()},
        }
        with store.read(keys) as batch:
            assert torch.equal(prompt[0, 5, :, :TOKENS], batch.layer(0, 5)[0])
    return results


def copies(source: torch.Tensor, target: torch.Tensor) -> dict[str, Callable[[], object]]:
    """A plain copy, and one in pieces of a segment each that are verified: before they are copied, and behind that."""
    pieces = list(
        zip(*(tensor.view(torch.uint8).numpy().reshape(-1, SEGMENT_BYTES) for tensor in (source, target)), strict=True)
    )

    def verified(first: bool) -> None:
        for piece, place in pieces:
            if first:
                checksum(piece)
            place[:] = piece
            if not first:
                checksum(piece)

    return {
        "plain copy": lambda: target.copy_(source),
        "checksums alone": lambda: [checksum(piece) for piece, _ in pieces],
        "checksum, then copy": lambda: verified(first=True),
        "copy, then checksum": lambda: verified(first=False),
    }


def processor_ms(work: Callable[[], object], rounds: int) -> float:
    """Median time on the processor: what other programs take is not in it."""
    work()
    return statistics.median(timeit(work, timer=time.process_time, number=1) for _ in range(rounds)) * 1e3


def put_against_file(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """A put, durable when it returns, against writing and syncing a plain file of as many bytes."""
    kv = make_kv(1)
    data = torch.cat([tensor.flatten() for tensor in kv.keys + kv.values]).numpy().tobytes()
    numbers = iter(range(1 << 30))

    def write() -> None:
        with open(folder / f"plain{next(numbers)}", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    with TieredStore(folder / "put", cpu_bytes=0) as store:
        put = compare(lambda: store.put(key_of(next(numbers)), kv, cost_s=0.1), write, rounds)
        return {"put / write and fsync a file": put}


def churn(folder: Path, policy: str) -> dict[str, float]:
    """The file against the budget after entries of mixed sizes of eleven times the budget were put."""
    budget, chance, written = 200 << 20, random.Random(1), 0
    base = torch.randn(HEADS, 2000, DIM)
    with TieredStore(folder / f"churn {policy}", cpu_bytes=0, disk_bytes=budget, policy=policy) as store:
        for number in range(400):
            part = base[:, : int(min(1500, max(20, chance.lognormvariate(5.2, 0.8))))]
            kv = ChunkKV([part] * LAYERS, [part] * LAYERS, 0)
            written += kv.nbytes
            store.put(key_of(number), kv)
        stats = store.stats()
        return {
            "written / budget": written / budget,
            "live / budget": stats.bytes["disk"] / budget,
            "file / budget": stats.file_bytes / budget,
        }


def many_entries(folder: Path, count: int) -> dict[str, float]:
    """What 100,000 entries cost: opening, memory, and the policy for each get."""
    kv = ChunkKV([torch.zeros(1, 1, 8)], [torch.zeros(1, 1, 8)], 0)
    with TieredStore(folder / "many", cpu_bytes=0) as store:
        for first in range(0, count, 2000):
            store.put_many([(key_of(number), kv, 0.1) for number in range(first, min(first + 2000, count))])
    before = unshared_bytes()
    started = time.perf_counter()
    store = TieredStore(folder / "many", cpu_bytes=0)
    opened = time.perf_counter() - started
    grown = unshared_bytes() - before
    chance = random.Random(1)
    keys = [key_of(chance.randrange(count)) for _ in range(5000)]
    disk = store._disk
    assert disk is not None
    noted = timeit(lambda: [disk.touch([key]) for key in keys], number=1) / len(keys)  # type: ignore[func-returns-value]
    entered = timeit(store.flush, number=1) / len(set(keys))
    store.close()
    planner = Planner(MemoryBooks(), get_policy("pgdsf"), 1 << 40)
    admitted = {key_of(number): planner.admit(key_of(number), kv.nbytes, Terms(cost_s=0.1)) for number in range(count)}
    rows = {key: row for key, row in admitted.items() if row is not None}
    ranked = timeit(lambda: [planner.use(key, rows[key]) for key in keys], number=1) / len(keys)  # type: ignore[func-returns-value]
    return {
        "entries": count,
        "open_seconds": opened,
        "index_bytes_per_entry": max(grown, 0) / count,
        "policy_us_per_get_disk": noted * 1e6,
        "policy_us_per_get_memory": ranked * 1e6,
        "books_us_per_get_written_later": entered * 1e6,
    }


def unshared_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(errors="replace").splitlines() if ":" in line
    )
    return int(fields["RssAnon"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, for both sides")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = {
            "speed": get_into_prompt(folder, args.rounds) | put_against_file(folder, args.rounds),
            "churn": {policy: churn(folder, policy) for policy in ("lru", "pgdsf")},
            "many entries": many_entries(folder, args.entries),
        }
    results = json.dumps({"torch": torch.__version__, "threads": args.threads, **found}, indent=1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "store-speed.json").write_text(results)
    print(results)


if __name__ == "__main__":
    main()
