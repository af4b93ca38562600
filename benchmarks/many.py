"""Questions side by side against one after the other: the same prompts and answers, in turn, in one run.

    python -P benchmarks/many.py [--model NAME_OR_PATH] [--requests N] [--chunks N] [--tokens N] [--rounds N] [--dtype DTYPE]
        [--weights float16|int8] [--json FILE]

Every request has chunks of 256 tokens of its own, placed from CPU memory by ``LegoLink(16)``, a question of 16 tokens, and an
answer of ``--tokens``. ``first`` holds each first token, counted from when all were asked, against when its turn would come one
after the other.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import torch

from ragkv import Engine, LegoLink
from ragkv.evaluation.conditions import processor, versions
from ragkv.model.loading import BUNDLED, load_model
from ragkv.model.packed import Packing

CHUNK_TOKENS, QUESTION_TOKENS = 256, 16


def ids(count: int, vocab_size: int, rng: random.Random) -> list[int]:
    """Random token ids."""
    return [rng.randrange(100, vocab_size) for _ in range(count)]


def one_by_one(engine: Engine, asked: list[Any], **options: Any) -> tuple[float, list[float]]:
    """Seconds in all, and seconds to each first token."""
    begin, firsts = time.perf_counter(), []
    for one in asked:
        waited = time.perf_counter() - begin
        firsts.append(waited + engine.generate(*one, **options).report.first_token_ms / 1e3)
    return time.perf_counter() - begin, firsts


def together(engine: Engine, asked: list[Any], **options: Any) -> tuple[float, list[float]]:
    """Likewise, side by side."""
    begin = time.perf_counter()
    answers = engine.generate_many(asked, at_once=len(asked), **options)
    return time.perf_counter() - begin, [answer.report.first_token_ms / 1e3 for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype")
    parser.add_argument("--weights", choices=get_args(Packing), help="packed for a CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loading = {name: value for name in ("dtype", "weights") if (value := getattr(args, name)) is not None}
    model, tokenizer, template, *_ = load_model(args.model, None, loading)
    engine, rng = Engine(model, tokenizer, template=template, method=LegoLink(16)), random.Random(0)
    vocab = min(engine.decoder.vocab_size, len(tokenizer)) - 1
    asked = [
        (engine.add([ids(CHUNK_TOKENS, vocab, rng) for _ in range(args.chunks)]), ids(QUESTION_TOKENS, vocab, rng))
        for _ in range(args.requests)
    ]
    options = {"max_new_tokens": args.tokens, "do_sample": False, "eos_token_id": None}
    engine.generate_many(asked[:2], max_new_tokens=2)  # once for the first time of everything
    rounds = []
    for _ in range(args.rounds):
        alone_s, turns = one_by_one(engine, asked, **options)
        steps = engine.runner.steps()
        before = steps.sizes.total(), sum(steps.sizes.elements())
        many_s, firsts = together(engine, asked, **options)
        served = (sum(steps.sizes.elements()) - before[1]) / (steps.sizes.total() - before[0])
        first = max(b / a for a, b in zip(turns, sorted(firsts), strict=True))
        rounds.append({"alone_s": alone_s, "many_s": many_s, "first": first, "served": served})
        print(
            f"one by one {alone_s:6.1f} s, side by side {many_s:6.1f} s: {alone_s / many_s:.2f} times the throughput; "
            f"first token at most {first:.2f} of its turn; {served:.1f} prompts a forward"
        )
    ratio = statistics.median(each["alone_s"] / each["many_s"] for each in rounds)
    print(f"median: {ratio:.2f} times the throughput")
    if args.json:
        where = {"model": Path(args.model).name, "dtype": str(engine.decoder.dtype), "threads": torch.get_num_threads()}
        asked_for = {name: getattr(args, name) for name in ("weights", "requests", "chunks", "tokens")}
        found = {"throughput": ratio, "rounds": rounds, **where, **asked_for, **versions(), "device": processor()}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
