"""What codecs make of KV: bytes, errors and the speed of one thread.

python benchmarks/encoded.py codecs|levels|tender [--threads N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from timeit import timeit

import torch

from ragkv.chunk import ChunkKV
from ragkv.kernels import Rotation
from ragkv.store.codecs import CODECS, CacheGen, Codec, get_codec
from ragkv.store.encode import encode
from ragkv.store.remote.levels import LEVELS
from ragkv.store.rope import Rope, ropes_of

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
    """Numbers with the spread of real K, whose channels differ by orders of magnitude, which nothing turns: for speed."""
    draw, scale = torch.Generator().manual_seed(1), torch.logspace(-1.5, 1, 64)
    keys = [torch.randn(2, 256, 64, generator=draw) * scale for _ in range(4)]
    return [ChunkKV(keys, [torch.randn(2, 256, 64, generator=draw) for _ in range(4)], 0)], []


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
    encode_s = timeit(lambda: [encode(kv, codec=codec, ropes=ropes) for kv in chunks], number=1)
    decode_s = statistics.median(timeit(lambda: [r.decode(p) for r, p in encoded], number=1) for _ in range(3))
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
    parser.add_argument("what", choices=["codecs", "levels", "tender"])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "tender":
        found = tenders()
    elif args.what == "levels":
        found = codecs({f"level {name}": level.codec for name, level in LEVELS.items()})
    else:
        kinds = {name: get_codec(name) for name in CODECS}
        found = codecs(kinds | {"cachegen, groups of 10": CacheGen(group_tokens=10)})
    results = json.dumps({"torch": torch.__version__, "threads": args.threads, args.what: found}, indent=1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"store-{args.what}.json").write_text(results)
    print(results)


if __name__ == "__main__":
    main()
