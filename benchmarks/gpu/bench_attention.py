"""(c) selective attention beside PyTorch's flash attention on equal FLOPs, and beside SDPA with a mask and FlexAttention.

Targets at S = 0.15 N: 0.7 of the dense causal kernel's FLOP rate, and faster than SDPA with a mask.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from measure import Bench
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ragkv.kernels import key_spans, scored_attention, selective_attention

HEADS, KV_HEADS, DIM = 32, 8, 128


def run(bench: Bench) -> None:
    """At several lengths."""
    for keys in bench.lengths(64, 4096, 16384, 65536):
        rows = scattered(bench, keys * 15 // 100, keys)
        q, k, v = (bench.random(heads, n, DIM) for heads, n in ((HEADS, len(rows)), (KV_HEADS, keys), (KV_HEADS, keys)))
        flops, spans = 4 * DIM * HEADS * int((rows + 1).sum()), key_spans(rows)
        row: dict[str, Any] = {"benchmark": "attention", "keys": keys}
        call = lambda q=q, k=k, v=v, s=spans: selective_attention(q, k, v, s, impl=bench.impl)  # noqa: E731
        bench.timed(call, flops=flops, what="selective", queries=len(rows), **row)
        mask = (torch.arange(keys, device=bench.device) <= rows[:, None])[None, None]
        masked = lambda q=q, k=k, v=v, m=mask: _masked(q, k, v, m)  # noqa: E731
        bench.timed(masked, flops=flops, what="sdpa with a mask", **row)
        del mask
        _flex(bench, (q, k, v), rows, flops, row)
        _dense(bench, flops, row)
        for queries in (1, 8 if bench.tiny else 32):  # a token, a question
            few = scattered(bench, queries, keys)
            flops, size = 4 * DIM * HEADS * int((few + 1).sum()), 2 * k.nbytes
            call = partial(selective_attention, q[:, :queries], k, v, key_spans(few), impl=bench.impl)
            bench.timed(call, flops=flops, size=size, what="selective, few", queries=queries, **row)
        asked = min(32, q.shape[1])
        spans = key_spans(torch.arange(keys - asked, keys, device=bench.device))
        weights = torch.full((asked,), 1 / asked, device=bench.device)
        scored = partial(scored_attention, q[:, -asked:], k, v, spans, weights, impl=bench.impl)
        read = 3 * k.numel() * k.element_size()  # keys twice
        bench.timed(scored, size=read, benchmark="scored_attention", keys=keys, queries=asked)


def scattered(bench: Bench, queries: int, keys: int) -> torch.Tensor:
    """Sorted positions, the last eight of them a question's at the end."""
    question = min(8, queries)
    rows = torch.randperm(keys - 32, device=bench.device)[: queries - question].sort().values
    return torch.cat([rows, torch.arange(keys - question, keys, device=bench.device)])


def _flex(bench: Bench, given: tuple[torch.Tensor, ...], rows: torch.Tensor, flops: int, row: dict[str, Any]) -> None:
    """What PyTorch compiles for the same keys; which blocks of them each row sees is found before."""
    q, k, v = (one[None] for one in given)
    blocks = create_block_mask(
        lambda batch, head, query, key: key <= rows[query], None, None, len(rows), k.shape[2], device=bench.device
    )
    run: Any = torch.compile(flex_attention, dynamic=False) if bench.device.type == "cuda" else flex_attention
    try:
        bench.timed(lambda: run(q, k, v, block_mask=blocks, enable_gqa=True), flops=flops, what="FlexAttention", **row)
    except Exception as error:  # a compiler that is missing, say: the rest is measured all the same
        bench.write(what="FlexAttention", error=str(error).partition("\n")[0], **row)


def _dense(bench: Bench, flops: int, row: dict[str, Any]) -> None:
    """PyTorch's flash attention, causal, on a square that comes to about as many FLOPs."""
    side = max(16, int((flops / (2 * DIM * HEADS)) ** 0.5) // 128 * 128)
    q, k, v = (bench.random(1, heads, side, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if bench.device.type == "cuda" else nullcontext()
    with flash:
        call = lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
        bench.timed(call, flops=2 * DIM * HEADS * side * side, what="dense causal", side=side, **row)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As transformers calls it: keys and values repeated for every query head."""
    k, v = k.repeat_interleave(HEADS // KV_HEADS, 0), v.repeat_interleave(HEADS // KV_HEADS, 0)
    return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)
