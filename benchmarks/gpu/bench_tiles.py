"""Which tile sizes make selective attention fastest: the ones that it uses were chosen so that nothing spills, not by timing."""

from __future__ import annotations

from itertools import product

from bench_attention import DIM, HEADS, KV_HEADS, scattered
from measure import Bench

from ragkv.kernels import key_spans, selective_attention

SIZES = {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}


def run(bench: Bench) -> None:
    """Every combination, S = 0.15 N and a few queries; what does not fit the GPU says so."""
    if bench.device.type != "cuda":
        return
    from triton.errors import TritonError

    from ragkv.kernels.triton_impl import attention

    plain = attention.tuning
    for keys in bench.lengths(64, 16384):
        for queries in (32, keys * 15 // 100):
            rows = scattered(bench, queries, keys)
            shapes = ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys))
            q, k, v = (bench.random(heads, tokens, DIM) for heads, tokens in shapes)
            spans, flops = key_spans(rows), 4 * DIM * HEADS * int((rows + 1).sum())
            own = plain(DIM, q.dtype, attention.capability(q.device))
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
