"""Which tile sizes make selective attention and placing fastest: those in use were chosen by what the compiler makes of them."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

from bench_attention import DIM, HEADS, KV_HEADS, scattered
from bench_memory import pieces_of
from measure import Bench

from ragkv.kernels import key_spans, place_pieces, selective_attention

SIZES = {"BLOCK_M": (16, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)}
PLACING = {"BLOCK": (32, 64), "AT_ONCE": (1, 2, 4), "num_warps": (4, 8)}


def run(bench: Bench) -> None:
    """Every combination; what does not fit the GPU says so. On a CPU nothing is measured."""
    if bench.device.type == "cuda":
        _placing(bench)
        _attention(bench)


def _placing(bench: Bench) -> None:
    """Keys and values by themselves, as they are stored, beside the sizes in use."""
    from triton.errors import TritonError

    from ragkv.kernels.triton_impl import place

    plain = place.constants
    for tokens in bench.lengths(64, 16384):
        for kind in ("bf16", "pool", "int8", "fp8", "int4"):
            for side in ("k", "v"):
                pieces, size = pieces_of(bench, kind, tokens, 512, side)
                for sizes in ({}, *(dict(zip(PLACING, values, strict=True)) for values in product(*PLACING.values()))):
                    row: dict[str, Any] = {"benchmark": "tiles", "operation": f"place {kind} {side}", "tokens": tokens}
                    row["sizes"] = sizes
                    place.constants = lambda *kind, s=sizes: {**plain(*kind), **s}  # type: ignore[assignment]
                    try:
                        bench.timed(partial(place_pieces, pieces, impl=bench.impl), size=size, **row)
                    except TritonError as error:
                        bench.write(**row, error=str(error)[:200])
                    finally:
                        place.constants = plain


def _attention(bench: Bench) -> None:
    """One query, a question of 32, and S = 0.15 N."""
    from triton.errors import TritonError

    from ragkv.kernels.triton_impl import attention

    plain = attention.tuning
    for keys in bench.lengths(64, 16384):
        for queries in (1, 32, keys * 15 // 100):
            rows = scattered(bench, queries, keys)
            shapes = ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys))
            q, k, v = (bench.random(heads, tokens, DIM) for heads, tokens in shapes)
            spans, flops = key_spans(rows), 4 * DIM * HEADS * int((rows + 1).sum())
            own = plain(DIM, q.dtype, attention.capability(q.device), queries * HEADS // KV_HEADS)
            choices = [own, *(dict(zip(SIZES, sizes, strict=True)) for sizes in product(*SIZES.values()))]
            for sizes in choices:
                attention.tuning = lambda *_, s=sizes: s
                call = lambda q=q, k=k, v=v, s=spans: selective_attention(q, k, v, s, impl=bench.impl)  # noqa: E731
                try:
                    bench.timed(call, flops=flops, benchmark="tiles", keys=keys, queries=queries, sizes=sizes)
                except TritonError as error:
                    bench.write(benchmark="tiles", keys=keys, queries=queries, sizes=sizes, error=str(error)[:200])
                finally:
                    attention.tuning = plain
