"""Attention of scattered queries in plain torch: it runs anywhere and defines what the fused kernels compute.

H query heads, K kv heads, S queries, N keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ragkv.kernels.scoring import Scoring

_QUERIES = 256  # at once, so that scores [H, queries, N] stay small


def selective_attention(query: Tensor, key: Tensor, value: Tensor, spans: Tensor, scoring: Scoring) -> Tensor:
    """See :func:`ragkv.kernels.selective_attention`."""
    return _out(query, value, [_attended(weights, value) for weights in _weights(query, key, spans, scoring)])


def scored_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Tensor, weights: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """See :func:`ragkv.kernels.scored_attention`."""
    scores, pieces = torch.zeros(key.shape[1], dtype=torch.float32, device=key.device), []
    for shares, counts in zip(_weights(query, key, spans, scoring), weights.split(_QUERIES), strict=True):
        pieces.append(_attended(shares, value))
        scores += counts @ shares.mean((0, 1)).to(counts.dtype)
    return _out(query, value, pieces), scores


def _attended(weights: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("kgsn,knd->skgd", weights, value.to(weights.dtype)).flatten(1, 2)


def _out(query: Tensor, value: Tensor, pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces).to(query.dtype) if pieces else query.new_empty(0, query.shape[0], value.shape[2])


def _weights(query: Tensor, key: Tensor, spans: Tensor, scoring: Scoring) -> Iterator[Tensor]:
    """Attention weights ``[K, H / K, queries, N]`` of one block of queries after the other, in fp32 (or fp64)."""
    scale, softcap, sinks = scoring
    groups = query.shape[0] // key.shape[0]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, at = key.to(wide), torch.arange(key.shape[1], device=key.device)
    for block, seen in zip(query.split(_QUERIES, 1), spans.split(_QUERIES), strict=True):
        scores = torch.einsum("kgsd,knd->kgsn", block.to(wide).unflatten(0, (key.shape[0], groups)), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        outside = (at < seen[:, :1]) | (at > seen[:, 1:])  # [queries, N]
        scores = scores.masked_fill(outside, -torch.inf)
        if sinks is not None:
            sink = sinks.to(wide).view(key.shape[0], groups, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1)[..., : key.shape[1]]
        yield weights.masked_fill(outside, 0.0)  # a query that sees nothing gets nothing
