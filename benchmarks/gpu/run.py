"""Runs the GPU benchmarks; see run.sh, which runs the kernels' tests on the GPU before.

python benchmarks/gpu/run.py                    # memory, attention and ttft, on the first GPU
python benchmarks/gpu/run.py attention --tokens 16384 --rounds 20
python benchmarks/gpu/run.py graphs             # fixed shapes as CUDA graphs, on and off
python benchmarks/gpu/run.py ttft graphs --shape qwen-0.5b
python benchmarks/gpu/run.py tiles              # which tile sizes are fastest
python benchmarks/gpu/run.py --tiny             # on a CPU: shows only that the programs run
"""

from __future__ import annotations

import argparse
import importlib
import sys
from datetime import date
from pathlib import Path

import torch

PARTS = ("memory", "attention", "ttft")
MORE = ("graphs", "tiles")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", default=list(PARTS), help=f"of {', '.join((*PARTS, *MORE))}; the first three by default"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU; the figures mean nothing")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=(), help="lengths of prompts, instead of each part's own"
    )
    parser.add_argument("--shape", default="8b", help="of the model of ttft and graphs: 8b, qwen-0.5b or qwen-1.5b")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--out", type=Path, help="file of raw rows; benchmarks/results/gpu-DATE-DEVICE.jsonl by default"
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - {*PARTS, *MORE}:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join((*PARTS, *MORE))}")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --tiny shows on a CPU that the programs run")
    from bench_ttft import SHAPES
    from measure import Bench

    if args.shape not in SHAPES:
        parser.error(f"no shape {args.shape}: there are {', '.join(SHAPES)}")

    device = torch.device("cpu" if args.tiny else "cuda")
    bench = Bench(device, args.tiny, 2 if args.tiny else args.rounds, args.out, tuple(args.tokens), args.shape)
    if args.out is None and not args.tiny:
        name = torch.cuda.get_device_name(device).replace(" ", "-")
        bench.path = Path(__file__).parents[1] / "results" / f"gpu-{date.today().isoformat()}-{name}.jsonl"
    for part in args.parts:
        importlib.import_module(f"bench_{part}").run(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
