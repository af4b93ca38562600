"""What advice says of prompts, beside what they take; and what Auto picks by it.

    python benchmarks/advice.py --model PATH --dtype bfloat16

Prompts are chunks of two documents of random ids, one after the other, and a question of 32. Of each length, Auto and a full
prefill run in turn, a round after the other; medians are reported. KV come from memory, and from LMDB with a warm page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from datetime import date
from time import perf_counter

import torch

import ragkv
from ragkv.machine import machine
from ragkv.store.rates import PAGE_CACHE

CHUNK = 128


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--dtype", help="of the weights (default: the model's own)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024], help="chunk tokens of prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that measuring may take")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--json", help="write all figures to this file")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
    options = {"dtype": args.dtype} if args.dtype else {}
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for tier, cpu_bytes in (("cpu", 4 << 30), ("disk", 0)):
            with ragkv.RAG.from_pretrained(args.model, path=folder, cpu_bytes=cpu_bytes, **options) as rag:
                advice = rag.engine.advise(limit_s=args.limit)
                rows += prompts(args, rag.engine, advice, tier)
        engine = rag.engine
        about = {
            "date": date.today().isoformat(),
            "machine": machine(engine.decoder.device),
            "torch": torch.__version__,
            "model": engine.decoder.config.model_type,
            "layers": len(engine.decoder.layers),
            "dtype": str(engine.decoder.dtype),
        }
    return {"conditions": about, "advice": advice.as_dict(1_000_000), "prompts": rows}


def prompts(args: argparse.Namespace, engine: ragkv.Engine, advice: ragkv.Advice, tier: str) -> list[dict]:
    """What prompts take, predicted and measured."""
    random = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(10, engine.decoder.vocab_size - 300, (count,), generator=random).tolist()

    question, rows = ids(advice.question_tokens), []
    documents = [engine.add_document([ids(CHUNK) for _ in range(max(args.lengths) // CHUNK // 2)]) for _ in range(2)]
    for length in args.lengths:
        chunks = [chunk for document in documents for chunk in document[: length // CHUNK // 2]]
        engine.store.prefetch(list(engine.documents.keys(chunks))).result()
        times: dict[str, list[float]] = {"auto": [], "full-prefill": []}
        for number in range(args.rounds + 1):
            for method, spent in times.items():
                begin = perf_counter()
                prompt = engine.fuse(chunks, question, method=method)
                seconds = perf_counter() - begin
                if number:  # the first round warms up
                    spent.append(seconds)
                print(f"{tier}, {length} tokens, round {number}: {method} {seconds:.3f} s", file=sys.stderr)
                if method == "auto":
                    report = prompt.report
        source = PAGE_CACHE if tier == "disk" else tier
        row = {"tokens": length, "tier": tier, "picked": report.method, "why": report.why}
        row |= {"predicted_s": advice.reuse_s(source, length), "full_predicted_s": advice.full_s(length)}
        medians = [statistics.median(spent) for spent in times.values()]
        ratio = statistics.median(full / own for own, full in zip(*times.values(), strict=True))
        rows.append({**row, "measured_s": medians[0], "full_measured_s": medians[1], "faster": ratio})
    return rows


def table(result: dict) -> str:
    rows = [
        "| chunk tokens | KV in | picked | said | measured | full prefill, said | measured | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["prompts"]:
        said = [f"{row[name]:.3f} s" for name in ("predicted_s", "measured_s", "full_predicted_s", "full_measured_s")]
        cells = [f"{row['tokens']:,}", row["tier"], f"`{row['picked']}`", *said, f"{row['faster']:.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    args = parse()
    result = measure(args)
    print(table(result))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
