"""The store against its limits: ratios within one run, and what codecs cost. Policies: ``policies.py``.

    python benchmarks/store.py [--entries N] [--only codecs|levels|tender|speed] [--out FOLDER]

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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ragkv.chunk import ChunkKV
from ragkv.kernels import Rotation
from ragkv.store import Target, TieredStore, chunk_key
from ragkv.store.books import MemoryBooks
from ragkv.store.codecs import CODECS, CacheGen, Codec, get_codec
from ragkv.store.encode import encode
from ragkv.store.planner import Planner
from ragkv.store.policy import get_policy
from ragkv.store.record import SEGMENT_BYTES, checksum
from ragkv.store.remote.levels import LEVELS
from ragkv.store.rope import Rope, ropes_of
from ragkv.store.terms import Terms

LAYERS, HEADS, DIM, TOKENS, CHUNKS = 24, 2, 64, 256, 8  # a Qwen2 of 0.5B, 8 chunks


def make_kv(seed: int, tokens: int = TOKENS, layers: int = LAYERS, dtype: torch.dtype = torch.float32) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1.5, 1, DIM)  # channels of K differ by orders of magnitude

    def tensor(factor: torch.Tensor | float) -> torch.Tensor:
        return (torch.randn(HEADS, tokens, DIM, generator=generator) * factor).to(dtype)

    return ChunkKV([tensor(scale) for _ in range(layers)], [tensor(1.0) for _ in range(layers)], 0)


def key_of(number: int) -> bytes:
    return chunk_key("bench", [number], b"")


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    work()
    return clock() - started


def compare(ours: Callable[[], object], limit: Callable[[], object], rounds: int) -> dict[str, float]:
    """Seconds of both sides, and the median of limit / ours over alternating rounds."""
    ours(), limit()
    pairs = [(timed(ours), timed(limit)) for _ in range(rounds)]
    return {
        "seconds": statistics.median(mine for mine, _ in pairs),
        "limit_seconds": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(theirs / mine for mine, theirs in pairs),
    }


def get_into_prompt(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """A warm get of 8 chunks from LMDB into the prompt's own tensors, against a plain copy of as many bytes."""
    keys = [key_of(number) for number in range(CHUNKS)]
    prompt = torch.zeros(2, LAYERS, HEADS, CHUNKS * TOKENS, DIM)
    flat = torch.zeros(prompt.numel())
    plain = torch.randn(prompt.numel())
    with TieredStore(folder / "get", cpu_bytes=0) as store:
        store.put_many([(key, make_kv(number), 0.1) for number, key in enumerate(keys)])

        starts = list(range(0, CHUNKS * TOKENS, TOKENS))
        every = range(LAYERS)

        def whole() -> None:
            targets = [Target(prompt[0, layer], prompt[1, layer]) for layer in every]
            with store.read(keys) as batch:
                for index, start in enumerate(starts):
                    batch.place(index, every, targets, start)

        def by_layer() -> None:
            with store.read(keys) as batch:
                for layer in every:
                    targets = [Target(prompt[0, layer], prompt[1, layer])]
                    for index, start in enumerate(starts):
                        batch.place(index, range(layer, layer + 1), targets, start)

        def layers() -> None:
            with store.read(keys) as batch:
                for layer in range(LAYERS):
                    for index in range(CHUNKS):
                        batch.layer(index, layer)

        results = {
            "get into the prompt / plain copy": compare(whole, lambda: flat.copy_(plain), rounds),
            "get into the prompt, layer by layer / plain copy": compare(by_layer, lambda: flat.copy_(plain), rounds),
            "get as tensors of the store's / plain copy": compare(layers, lambda: flat.copy_(plain), rounds),
        }
        results["warm get, processor ms"] = {
            "get": processor_ms(whole, rounds),
            "open and close": processor_ms(lambda: store.read(keys).close(), rounds),
            "targets": processor_ms(lambda: [Target(prompt[0, layer], prompt[1, layer]) for layer in every], rounds),
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
    return statistics.median(timed(work, time.process_time) for _ in range(rounds)) * 1e3


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
        return {
            "put / write and fsync a file": compare(
                lambda: store.put(key_of(next(numbers)), kv, cost_s=0.1), write, rounds
            )
        }


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
    noted = timed(lambda: [disk.touch([key]) for key in keys]) / len(keys)  # type: ignore[func-returns-value]
    entered = timed(store.flush) / len(set(keys))
    store.close()
    planner = Planner(MemoryBooks(), get_policy("pgdsf"), 1 << 40)
    admitted = {key_of(number): planner.admit(key_of(number), kv.nbytes, Terms(cost_s=0.1)) for number in range(count)}
    rows = {key: row for key, row in admitted.items() if row is not None}
    ranked = timed(lambda: [planner.use(key, rows[key]) for key in keys]) / len(keys)  # type: ignore[func-returns-value]
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
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


Source = tuple[list[ChunkKV], list[Rotation | None]]  # chunks, and how their layers turn keys


def bundled_kv() -> Source:
    """KV of bundled documents, read by the bundled model."""
    from ragkv import Engine, PromptTemplate, bundled
    from ragkv.retrieval import TokenChunker

    model, tokenizer = bundled.load()
    engine = Engine(model, tokenizer, template=PromptTemplate(**bundled.TEMPLATE))
    chunks = []
    for text in list(bundled.documents().values())[:12]:
        chunks += engine.add_document(TokenChunker(tokenizer, 96).split(text))
    return [*filter(None, map(engine.store.get, engine.documents.keys(chunks)))], engine.decoder.rotations


def tiny_kv() -> Source:
    """KV of random ids, read by a tiny model with random weights."""
    from ragkv import Engine, PromptTemplate
    from ragkv.testing import random_ids, tiny_model

    engine = Engine(tiny_model(), template=PromptTemplate(prefix=[1]))
    chunks = engine.add([random_ids(96) for _ in range(8)])
    return [*filter(None, map(engine.store.get, engine.documents.keys(chunks)))], engine.decoder.rotations


def made_up_kv() -> Source:
    """Numbers with the spread of real K, which nothing turns: what speed is measured on."""
    return [make_kv(1, layers=4)], []


def sources() -> Iterator[tuple[str, list[ChunkKV], tuple[Rope | None, ...]]]:
    """KV in bf16 by where they come from, and how they turn."""
    for source, make in (("bundled model", bundled_kv), ("tiny_model", tiny_kv), ("made up", made_up_kv)):
        kvs, rotations = make()
        halves = [ChunkKV([k.bfloat16() for k in kv.keys], [v.bfloat16() for v in kv.values], kv.base) for kv in kvs]
        yield source, halves, ropes_of(rotations)


def codecs(kinds: dict[str, Codec]) -> dict[str, dict[str, dict[str, float]]]:
    """Bytes against raw bf16, relative errors, and speed of one thread, by source of the KV and codec."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for source, chunks, ropes in sources():
        results[source] = {name: coded(chunks, codec, ropes) for name, codec in kinds.items()}
        for name, codec in kinds.items():
            if ropes and codec.before_rotation:
                results[source][f"{name}, K as it is"] = coded(chunks, codec, ())
    return results


def coded(chunks: list[ChunkKV], codec: Codec, ropes: tuple[Rope | None, ...]) -> dict[str, float]:
    encoded = [encode(kv, codec=codec, ropes=ropes) for kv in chunks]
    encode_s = timed(lambda: [encode(kv, codec=codec, ropes=ropes) for kv in chunks])
    decode_s = statistics.median(timed(lambda: [r.decode(p) for r, p in encoded]) for _ in range(3))
    decoded = [record.decode(payload) for record, payload in encoded]
    total = sum(kv.nbytes for kv in chunks)
    return {
        "bytes": sum(record.payload_bytes for record, _ in encoded) / total,
        "relative_error_k": error([kv.keys for kv in decoded], [kv.keys for kv in chunks]),
        "relative_error_v": error([kv.values for kv in decoded], [kv.values for kv in chunks]),
        "encode_gb_s": total / encode_s / 1e9,
        "decode_gb_s": total / decode_s / 1e9,
    }


def tender(chunks: list[ChunkKV], ropes: tuple[Rope | None, ...], bits: int, rows: int = 64) -> dict[str, float]:
    """Integers by channel, as Tender has them (arXiv:2406.12930): the steps of a head's channels are powers of two apart.

    Of so many rows a head has one step, and a channel its middle, in bf16, and three bits for its power. K is taken unrotated.
    """
    size, wrong, norm = 0.0, [0.0, 0.0], [0.0, 0.0]
    for kv in chunks:
        for layer, pair in enumerate(kv):
            for side, tensor in enumerate(pair):
                rope = ropes[layer] if ropes and side == 0 else None
                numbers = tensor.float() if rope is None else rope.turned(tensor, kv.base, back=True).float()
                for part in numbers.split(rows, 1):
                    middle = ((part.amax(1, keepdim=True) + part.amin(1, keepdim=True)) / 2).bfloat16().float()
                    reach = (part - middle).abs().amax(1, keepdim=True).clamp_min(1e-12)
                    most = reach.amax(2, keepdim=True)
                    step = most / 2 ** (most / reach).log2().floor().clamp(0, 7) / (2 ** (bits - 1) - 1)
                    near = ((part - middle) / step).round() * step + middle
                    wrong[side] += float((near - part).square().sum())
                    norm[side] += float(part.square().sum())
                    heads, tokens, dim = part.shape
                    size += heads * (tokens * dim * bits / 8 + 2 + dim * (2 + 3 / 8))
    share = size / sum(kv.nbytes for kv in chunks)
    k, v = ((wrong[side] / norm[side]) ** 0.5 for side in (0, 1))
    return {"bytes": share, "relative_error_k": k, "relative_error_v": v}


def at_equal_bytes(chunks: list[ChunkKV], ropes: tuple[Rope | None, ...], share: float) -> dict[str, float]:
    """``cachegen`` with the steps by which it takes as many bytes."""
    low, high = 0.02, 4.0
    for _ in range(10):
        middle = (low * high) ** 0.5
        found = coded(chunks, CacheGen((2 * middle, 3 * middle, 4 * middle)), ropes)
        low, high = (middle, high) if found["bytes"] > share else (low, middle)
    return found


def tenders() -> dict[str, dict[str, dict[str, float]]]:
    """Tender's integers of 4 and 8 bits, and our codecs beside them, by source of the KV."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for source, every, ropes in sources():
        chunks = every[:8]
        found = results[source] = {f"tender, {bits} bits": tender(chunks, ropes, bits) for bits in (4, 8)}
        found |= {name: coded(chunks, get_codec(name), ropes) for name in ("int4", "int8")}
        for bits in (4, 8):
            found[f"cachegen, as many bytes as {bits}"] = at_equal_bytes(
                chunks, ropes, found[f"tender, {bits} bits"]["bytes"]
            )
    return results


def error(got: list[list[torch.Tensor]], want: list[list[torch.Tensor]]) -> float:
    """Norm of the difference over the norm, of all numbers together."""
    mine, theirs = (torch.cat([tensor.float().flatten() for kv in side for tensor in kv]) for side in (got, want))
    return float((mine - theirs).norm() / theirs.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", choices=["codecs", "levels", "tender", "speed"])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, for both sides")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, object] = {"torch": torch.__version__, "threads": arguments.threads}
    if arguments.only in (None, "speed"):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            results["speed"] = get_into_prompt(folder, arguments.rounds) | put_against_file(folder, arguments.rounds)
            results["churn"] = {policy: churn(folder, policy) for policy in ("lru", "pgdsf")}
            results["many entries"] = many_entries(folder, arguments.entries)
    if arguments.only in (None, "codecs"):
        kinds = {name: get_codec(name) for name in CODECS} | {"cachegen, groups of 10": CacheGen(group_tokens=10)}
        results["codecs"] = codecs(kinds)
    if arguments.only in (None, "levels"):
        results["levels"] = codecs({f"level {name}": level.codec for name, level in LEVELS.items()})
    if arguments.only == "tender":
        results["tender"] = tenders()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"store{'-' + arguments.only if arguments.only else ''}.json").write_text(
        json.dumps(results, indent=1)
    )
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
