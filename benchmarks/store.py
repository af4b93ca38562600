"""The store against its limits: ratios within one run, and policies on a stream of real passages.

    python benchmarks/store.py [--dataset FILE] [--entries N] [--out FOLDER]

Every ratio is taken from alternating rounds of both sides in this process; the median of the rounds is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ragkv.chunk import ChunkKV
from ragkv.store import TieredStore, chunk_key
from ragkv.store.codecs import CODECS, get_codec
from ragkv.store.encode import encode
from ragkv.store.policy import POLICIES, Belady
from ragkv.store.simulation import Request, replay

LAYERS, HEADS, DIM, TOKENS, CHUNKS = 24, 2, 64, 256, 8  # a Qwen2 of 0.5B, 8 chunks


def make_kv(seed: int, tokens: int = TOKENS, layers: int = LAYERS, dtype: torch.dtype = torch.float32) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1.5, 1, DIM)  # channels of K differ by orders of magnitude

    def tensor(factor: torch.Tensor | float) -> torch.Tensor:
        return (torch.randn(HEADS, tokens, DIM, generator=generator) * factor).to(dtype)

    return ChunkKV([tensor(scale) for _ in range(layers)], [tensor(1.0) for _ in range(layers)], 0)


def key_of(number: int) -> bytes:
    return chunk_key("bench", [number], b"")


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


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

        def placed() -> None:
            with store.read(keys) as batch:
                for layer in range(LAYERS):
                    batch.place_layer(layer, prompt[0, layer], prompt[1, layer], starts)

        def layers() -> None:
            with store.read(keys) as batch:
                for layer in range(LAYERS):
                    for index in range(CHUNKS):
                        batch.layer(index, layer)

        results = {
            "get into the prompt / plain copy": compare(placed, lambda: flat.copy_(plain), rounds),
            "get as tensors of the store's / plain copy": compare(layers, lambda: flat.copy_(plain), rounds),
        }
        with store.read(keys) as batch:
            assert torch.equal(prompt[0, 5, :, :TOKENS], batch.layer(0, 5)[0])
    return results


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
    noted = timed(lambda: [disk.touch(key) for key in keys]) / len(keys)
    entered = timed(store.flush) / len(set(keys))
    store.close()
    memory = TieredStore(cpu_bytes=1 << 40)
    for number in range(count):
        memory._cpu.put(key_of(number), kv, _terms())
    ranked = timed(lambda: [memory._cpu.use(key) for key in keys]) / len(keys)
    return {
        "entries": count,
        "open_seconds": opened,
        "index_bytes_per_entry": max(grown, 0) / count,
        "policy_us_per_get_disk": noted * 1e6,
        "policy_us_per_get_memory": ranked * 1e6,
        "books_us_per_get_written_later": entered * 1e6,
    }


def _terms():
    from ragkv.store.terms import Terms

    return Terms(cost_s=0.1)


def unshared_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024


def codecs() -> dict[str, dict[str, float]]:
    """Bytes against raw, speed, and error, on numbers with the spread of real K."""
    kv = make_kv(1, layers=4, dtype=torch.bfloat16)
    results = {}
    for name in CODECS:
        record, payload = encode(kv, codec=get_codec(name))
        encode_s = timed(lambda name=name: encode(kv, codec=get_codec(name)))
        decoded = record.decode(payload)
        decode_s = statistics.median(timed(lambda r=record, p=payload: r.decode(p)) for _ in range(5))
        error = torch.cat([(a.float() - b.float()).flatten() for a, b in zip(decoded.keys, kv.keys, strict=True)])
        scale = torch.cat([b.float().flatten() for b in kv.keys])
        results[name] = {
            "bytes": record.payload_bytes / kv.nbytes,
            "encode_gb_s": kv.nbytes / encode_s / 1e9,
            "decode_gb_s": kv.nbytes / decode_s / 1e9,
            "relative_error_k": float(error.norm() / scale.norm()),
        }
    return results


def read_passages(file: Path) -> list[str]:
    """Passages of a CacheBlend JSON or of a LongBench JSONL."""
    if file.suffix == ".jsonl":
        contexts = [json.loads(line)["context"] for line in file.read_text().splitlines() if line]
        return [part for context in contexts for part in context.split("Passage ") if part.strip()]
    return [f"{passage['title']} {passage['text']}" for row in json.loads(file.read_text()) for passage in row["ctxs"]]


def zipf_stream(passages: list[str], length: int, exponent: float, seed: int) -> list[Request]:
    """Passages asked for with a Zipf law; a prefill takes time linear and quadratic in the tokens."""
    chance = random.Random(seed)
    order = chance.sample(range(len(passages)), len(passages))
    weights = [1 / rank**exponent for rank in range(1, len(order) + 1)]
    catalogue = []
    for number in order:
        tokens = max(1, round(len(passages[number].split()) * 1.3))
        cost_s = 1e-4 * tokens + 1e-7 * tokens**2
        catalogue.append(Request(key_of(number), tokens * 12_288, tokens, cost_s))
    return chance.choices(catalogue, weights, k=length)


def policies(file: Path | None, length: int) -> dict[str, object]:
    """Hit rate by tokens and saved seconds of every policy, over capacities and three seeds."""
    if file is None:
        chance = random.Random(0)
        passages = [" word" * int(chance.lognormvariate(4.6, 0.8) + 8) for _ in range(750)]
    else:
        passages = read_passages(file)
    rows = []
    for share in (0.05, 0.1, 0.2, 0.4):
        for seed in range(3):
            stream = zipf_stream(passages, length, 0.9, seed)
            total = sum({request.key: request.size_bytes for request in stream}.values())
            for name in [*POLICIES, "belady"]:
                for selective in (False, True):
                    policy = Belady([request.key for request in stream]) if name == "belady" else POLICIES[name]()
                    outcome = replay(stream, policy, int(share * total), selective=selective)
                    rows.append(
                        {
                            "policy": name + ("+admission" if selective else ""),
                            "capacity": share,
                            "seed": seed,
                            "token_hit_rate": outcome.token_hit_rate,
                            "saved_seconds": outcome.saved_s,
                            "saved_share": outcome.saved_share,
                        }
                    )
    return {"passages": len(passages), "requests": length, "rows": rows}


def summary(rows: list[dict]) -> dict[str, dict[float, float]]:
    """Mean hit rate by tokens, by policy and capacity."""
    table: dict[str, dict[float, float]] = {}
    for row in rows:
        table.setdefault(row["policy"], {}).setdefault(row["capacity"], []).append(row["token_hit_rate"])
    return {name: {share: statistics.mean(rates) for share, rates in line.items()} for name, line in table.items()}


def plot(table: dict[str, dict[float, float]], target: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, line in table.items():
        axes.plot(list(line), list(line.values()), marker="o", linestyle="--" if "+" in name else "-", label=name)
    axes.set(xlabel="capacity, share of the corpus", ylabel="hit rate by tokens", xscale="log")
    axes.legend(fontsize=7, ncol=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="CacheBlend JSON or LongBench JSONL; without it, made-up lengths")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, for both sides")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, object] = {"torch": torch.__version__, "threads": arguments.threads}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        results["speed"] = get_into_prompt(folder, arguments.rounds) | put_against_file(folder, arguments.rounds)
        results["churn"] = {policy: churn(folder, policy) for policy in ("lru", "pgdsf")}
        results["many entries"] = many_entries(folder, arguments.entries)
    results["codecs"] = codecs()
    results["policies"] = policies(arguments.dataset, arguments.requests)
    table = summary(results["policies"]["rows"])
    results["token hit rate"] = {
        name: {str(share): rate for share, rate in line.items()} for name, line in table.items()
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "store.json").write_text(json.dumps(results, indent=1))
    plot(table, arguments.out / "store_policies.png")
    results["policies"] = {key: value for key, value in results["policies"].items() if key != "rows"}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
