"""What a pool's lossy levels do to real questions: the next token, against that over KV as they were computed.

    python -P benchmarks/levels.py --data FILE [--model PATH] [--dtype bfloat16] [--limit 8] [--method reuse] [--json FILE]

FILE is one that `ragkv eval` reads. A case's documents are read once; then its prompt is put together over these KV, and over what
each level makes of them, by the same method.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import ragkv
from ragkv.closeness import divergence, same_top
from ragkv.evaluation.conditions import processor, versions
from ragkv.evaluation.formats import read_cases
from ragkv.evaluation.statistics import Resampling
from ragkv.methods.words import parse_method
from ragkv.model.loading import BUNDLED, load_model
from ragkv.store import TieredStore
from ragkv.store.codecs import Raw
from ragkv.store.encode import encode
from ragkv.store.remote.levels import LEVELS
from ragkv.store.rope import ropes_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--dtype")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--method", default="reuse")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, template, *_ = load_model(args.model, None, {"dtype": args.dtype} if args.dtype else {})
    codecs = {"as computed": Raw(), **{name: level.codec for name, level in LEVELS.items()}}
    form, cases = read_cases(args.data, limit=args.limit)
    cases, method = cases[: args.limit], parse_method(args.method)
    figures: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in codecs}
    with ragkv.Engine(model, tokenizer, template=template, store=TieredStore()) as engine:
        ropes = ropes_of(engine.decoder.rotations)
        for case in cases:
            documents = [engine.add_document(parts) for parts in case.documents]
            chunks = [documents[document][chunk] for document, chunk in case.retrieved]
            kvs = {key: engine.store.get(key) for key in map(engine.documents.key, chunks)}
            full = engine.fuse(chunks, case.question, method=ragkv.FullPrefill()).logits
            want = None
            for name, codec in codecs.items():
                at = {key: encode(kv, codec=codec, ropes=ropes) for key, kv in kvs.items() if kv is not None}
                engine.store.put_many([(key, record.decode(payload), 0.0) for key, (record, payload) in at.items()])
                got = engine.fuse(chunks, case.question, method=method).logits
                want = got if want is None else want
                size = sum(record.payload_bytes for record, _ in at.values())
                found = {
                    "bytes": size / sum(kv.nbytes for kv in kvs.values() if kv is not None),
                    "KL to as computed": divergence(want, got),
                    "same token": same_top(want, got),
                    "KL to full prefill": divergence(full, got),
                }
                for figure, value in found.items():
                    figures[name].setdefault(figure, {})[case.id] = [value]
            print(
                f"{case.id}: {len(chunks)} chunks, "
                + ", ".join(f"{name} {each['KL to as computed'][case.id][0]:.4f}" for name, each in figures.items()),
                flush=True,
            )
            engine.store.remove_many(kvs)
    resampling = Resampling([case.id for case in cases], seed=0)
    table = {
        name: {figure: list(resampling.estimate(values) or ()) for figure, values in each.items()}
        for name, each in figures.items()
    }
    for name, each in table.items():
        print(
            f"{name:12}",
            ", ".join(
                f"{figure} {mean:.4f} ({low:.4f} to {high:.4f})" for figure, (mean, low, high, *_) in each.items()
            ),
        )
    if args.json:
        about = {
            "model": Path(args.model).name,
            "dtype": str(engine.decoder.dtype),
            "data": args.data.name,
            "form": form,
        }
        about |= {"cases": len(cases), "method": args.method, **versions(), "device": processor()}
        args.json.write_text(json.dumps({"conditions": about, "levels": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
