"""Prompts and answers over tiers that are too small, compared with a CPU's, where a GPU's work is done late; see fake.py.

    python benchmarks/gpu/fake/fake.py --late 1 benchmarks/gpu/fake/races.py --steps 40

Fails where a number differs: something was read before it was there, or overwritten or given away before it was read.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

import ragkv
from ragkv.fusion import convoy
from ragkv.testing import random_ids, tiny_model

PLAIN = ragkv.Reuse(), ragkv.LegoLink(3)
# What these choose goes by numbers: other tokens, where some are rounded to the next step.
CHOOSING = ragkv.CacheBlend(0.3), ragkv.SensitiveTokens(0.2), ragkv.RelevantTokens(0.2)
EXACT, ROUNDED = ("raw", "lossless"), ("fp8", "int8", "int4")
TIERS = ("cpu", "both", "all", "gpu", "disk")
KINDS = ("rushed", "many", "threads", "guesses", "past", "fuse", "answer", "rushed")
DOCUMENTS, LAYERS, EACH = 8, 9, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    choose, wrong, begun = random.Random(args.seed), 0, time.perf_counter()
    convoy.GROUP = 1  # more groups than stand on the device at once
    model = tiny_model(num_hidden_layers=LAYERS)
    there = tiny_model(num_hidden_layers=LAYERS).to("cuda")
    documents = [random_ids(choose.randint(9, 40), seed) for seed in range(DOCUMENTS)]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.steps):
            if not number % EACH:
                tiers, codec = TIERS[number // EACH % len(TIERS)], choose.choice(EXACT + ROUNDED)
                pair = engines(model, there, f"{folder}/{number}", codec, tiers, documents)
            said, off, how = step(KINDS[number % len(KINDS)], choose, pair, documents, codec in EXACT)
            bad = not off <= (1e-4 if codec in EXACT else 1e-3)
            wrong += bad
            print(f"{'WRONG ' if bad else ''}{tiers} {codec}: {said}, {how}, {off:.1e}", flush=True)
    print(f"{wrong} of {args.steps} wrong, {time.perf_counter() - begun:.0f} s")
    return 1 if wrong else 0


def engines(
    model: Any, there: Any, folder: str, codec: str, tiers: str, documents: list[list[int]]
) -> list[ragkv.Engine]:
    """One on a CPU with room for everything, one on a GPU whose tiers hold some of it."""
    whole = sum(map(len, documents)) * 2 * 4 * LAYERS * model.config.num_key_value_heads * model.config.head_dim
    sizes: dict[str, Any] = {
        "gpu": {"gpu_bytes": 8 * whole, "cpu_bytes": 8 * whole},
        "cpu": {"cpu_bytes": 8 * whole},
        "both": {"gpu_bytes": whole // 2, "cpu_bytes": 8 * whole},
        "disk": {"path": folder, "cpu_bytes": 0},
        "all": {"path": folder, "gpu_bytes": whole // 3, "cpu_bytes": whole},
    }[tiers]
    stores = ragkv.TieredStore(codec=codec), ragkv.TieredStore(codec=codec, device="cuda", **sizes)
    return [
        ragkv.Engine(model, store=stores[0], sensitivity=True, kernels="reference"),
        ragkv.Engine(there, store=stores[1], sensitivity=True, kernels="triton", piece_tokens=16),
    ]


def step(
    kind: str, choose: random.Random, pair: list[ragkv.Engine], documents: list[list[int]], exact: bool
) -> tuple[str, float, str]:
    """What was asked of both, by how much they differ, and how it ran."""
    picked = choose.sample(documents, choose.randint(1, 4))
    question = random_ids(choose.randint(3, 9), choose.randint(0, 99))
    method = choose.choice(PLAIN + CHOOSING if exact else PLAIN)
    options: dict[str, Any] = {"method": method}
    longer: dict[str, Any] = {"max_new_tokens": choose.randint(1, 6), "eos_token_id": None}

    def ask(engine: ragkv.Engine) -> list[Any]:
        if kind == "fuse":
            return [engine.fuse(engine.add(picked), question, **options)]
        if kind == "rushed":  # nobody waits between them, and the first one's memory is given away at once
            orders = [engine.add(part) for part in (picked, picked[1:] + picked[:1], picked[::-1], picked)]
            engine.fuse(orders[0], question, **options)
            return [engine.fuse(order, question, **options) for order in orders]
        if kind == "many":
            parts = picked, picked[::-1], picked[1:]
            return engine.fuse_many([(engine.add(part), question) for part in parts], **options)
        if kind == "threads":
            with ThreadPoolExecutor(3) as pool:
                alone = partial(engine.fuse, engine.add(picked), **options)
                return list(pool.map(alone, [random_ids(5, seed) for seed in range(3)]))
        if kind == "past":
            first = engine.generate(engine.add(picked[:2]), question, keep_past=True, **longer, **options)
            return [first, engine.generate(engine.add(picked[2:]), question, past=first.past, **longer, **options)]
        guesses: dict[str, Any] = {"prompt_lookup_num_tokens": 3} if kind == "guesses" else {}
        return [engine.generate(engine.add(picked), question, **guesses, **longer, **options)]

    wanted, got = map(ask, pair)
    if kind == "rushed" and choose.random() < 0.5:
        torch.cuda.empty_cache()
    off = max(difference(*each, exact) for each in zip(wanted, got, strict=True))
    return f"{kind} {type(method).__name__}", off, got[-1].report.ran


def difference(wanted: Any, got: Any, exact: bool) -> float:
    """Of logits, keys or values: the greatest, or the mean where some are rounded to the next step; of tokens any."""
    if isinstance(wanted, ragkv.Answer):
        return 0.0 if wanted.token_ids == got.token_ids or not exact else float("inf")
    pairs = [(wanted.logits, got.logits)]
    for layer, other in zip(wanted.past_key_values.layers, got.past_key_values.layers, strict=True):
        pairs += [(layer.keys, other.keys), (layer.values, other.values)]
    apart = [(one - other.cpu()).abs() for one, other in pairs]
    return max(float(each.max() if exact else each.mean()) for each in apart)


if __name__ == "__main__":
    sys.exit(main())
