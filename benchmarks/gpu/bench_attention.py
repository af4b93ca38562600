"""(c) selective attention beside PyTorch's flash attention on equal FLOPs, and beside SDPA with a mask.

Targets at S = 0.15 N: 0.7 of the dense causal kernel's FLOP rate, and faster than SDPA with a mask.
"""

from __future__ import annotations

import statistics

import torch
from measure import Bench
from torch.nn.functional import scaled_dot_product_attention

from ragkv.kernels import key_spans, question_scores, selective_attention

HEADS, KV_HEADS, DIM = 32, 8, 128


def run(bench: Bench) -> None:
    """At several lengths."""
    for keys in (64,) if bench.tiny else (4096, 16384, 65536):
        queries = keys * 15 // 100
        rows = torch.randperm(keys - 32, device=bench.device)[: queries - 8].sort().values
        rows = torch.cat([rows, torch.arange(keys - 8, keys, device=bench.device)])  # the question stands at the end
        q, k, v = (
            bench.random(HEADS, queries, DIM),
            bench.random(KV_HEADS, keys, DIM),
            bench.random(KV_HEADS, keys, DIM),
        )
        flops = 4 * DIM * HEADS * int((rows + 1).sum())
        spans = key_spans(rows)
        _row(
            bench,
            "selective",
            keys,
            flops,
            lambda q=q, k=k, v=v, s=spans: selective_attention(q, k, v, s, impl=bench.impl),
        )
        mask = (torch.arange(keys, device=bench.device) <= rows[:, None])[None, None]
        _row(bench, "sdpa with a mask", keys, flops, lambda q=q, k=k, v=v, m=mask: _masked(q, k, v, m))
        del mask
        _row(bench, "dense causal", keys, *_dense(bench, flops))
        few = key_spans(torch.arange(keys - 8, keys, device=bench.device))
        call = lambda q=q, k=k, s=few: question_scores(q[:, -8:], k, s, impl=bench.impl)  # noqa: E731
        seconds = bench.seconds(call)
        rate = 2 * k.numel() * k.element_size() / statistics.median(seconds)  # keys are read twice
        bench.write(
            benchmark="question_scores", keys=keys, queries=8, seconds=seconds, of_copy=rate / bench.copy_bandwidth
        )


def _row(bench: Bench, what: str, keys: int, flops: int, call) -> None:
    seconds = bench.seconds(call)
    rate = flops / statistics.median(seconds)
    bench.write(
        benchmark="attention",
        what=what,
        impl=bench.impl,
        keys=keys,
        flops=flops,
        seconds=seconds,
        flops_per_s=rate,
        host_seconds=bench.host(call),
    )


def _masked(q, k, v, mask):
    """As transformers calls it: keys and values repeated for every query head."""
    k, v = k.repeat_interleave(HEADS // KV_HEADS, 0), v.repeat_interleave(HEADS // KV_HEADS, 0)
    return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)


def _dense(bench: Bench, flops: int):
    """FLOPs and call of the dense causal kernel on a square that comes to about as many FLOPs."""
    side = max(16, int((flops / (2 * DIM * HEADS)) ** 0.5) // 128 * 128)
    q, k, v = (bench.random(1, heads, side, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return 2 * DIM * HEADS * side * side, lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
