"""What the host does for a warm prompt and an answer on a GPU: launches, copies, waits, by CUDA's calls; see fake.py.

    python benchmarks/gpu/fake/fake.py benchmarks/gpu/fake/waits.py --tokens 16384

Fails where PyTorch says that a warm prompt, or an answer but for reading its tokens, waits for the device, and where CUDA refuses.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_ttft import METHODS, TIERS, ids_of, model_of, token_bytes
from measure import Bench
from no_numbers import counts, reset

import ragkv

WARM, ROUNDS, CHUNK, ANSWER = 4, 15, 512, 33


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--shape", default="8b")
    args = parser.parse_args()
    bench = Bench(torch.device("cuda"), False, ROUNDS, None, (args.tokens,), args.shape)
    model, waits = model_of(bench), 0
    room = 3 * args.tokens * token_bytes(bench, model) // 2
    for tier, codec in TIERS.items():
        gpu_bytes = room if tier == "gpu" else 0
        store = ragkv.TieredStore(gpu_bytes=gpu_bytes, cpu_bytes=room, device=bench.device, codec=codec)
        engine = ragkv.Engine(model, store=store, sensitivity=True, foreign=ids_of(CHUNK, 20_000), kernels="triton")
        chunks, question = engine.add([ids_of(CHUNK, seed) for seed in range(args.tokens // CHUNK)]), ids_of(32, 10_000)
        fuse, answer = partial(engine.fuse, chunks, question), partial(engine.generate, chunks, question)
        for name, method in METHODS.items():
            waits += told(f"{tier}, {name}", partial(fuse, method=method))
        waits += told(f"{tier}, {ANSWER} tokens", partial(answer, max_new_tokens=ANSWER, eos_token_id=7))
    return 1 if waits else 0


def told(what: str, call: Callable[[], Any]) -> int:
    """Prints what a warm call does; how often it waits, as PyTorch says, or was refused."""
    for _ in range(WARM):
        call()
    spent = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        call()
        spent.append(time.thread_time() - begin)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reset()
        ran = call().report.ran
        done = counts()
    torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing CUDA operation" in str(each.message) for each in caught)
    refused = sum(count for name, count in done.items() if name.startswith("ERROR"))
    print(f"{what}: {ran}, {1e3 * min(spent):.1f} ms of the host, {waits} waits; {done}", flush=True)
    return waits + refused


if __name__ == "__main__":
    sys.exit(main())
