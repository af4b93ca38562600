"""Attention of scattered queries over all keys of a prompt, without an ``[S, N]`` mask.

Every attention rule that ragkv drives (causal, sliding window, attention chunk) lets a query see one run of keys: its span. Spans
take the mask's place. H query heads, K kv heads, S queries, N keys, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkv.kernels import reference_attention as reference
from ragkv.kernels.dispatch import Impl, implementation
from ragkv.kernels.scoring import Scoring
from ragkv.kernels.validation import check_index, check_same, check_shape, require

#: Largest head that the kernels take.
WIDEST_HEAD = 256


def key_spans(positions: Tensor, *, window: int | None = None, chunk: int | None = None) -> Tensor:
    """The keys that each query sees: its own position is the last one.

    Args:
        positions: ``[S]`` integer positions of the queries.
        window: sliding window: the last ``window`` keys, the query's own among them.
        chunk: attention chunk: the keys from the last multiple of ``chunk`` on.

    Returns:
        ``[S, 2]`` int32, first and last key.

    Raises:
        KernelError: both rules are given, or one is not positive.
    """
    check_index("positions", positions, None, "[S]")
    require(window is None or chunk is None, "window and chunk exclude each other")
    require(
        all(run is None or run > 0 for run in (window, chunk)),
        f"window and chunk must be positive, got {window} and {chunk}",
    )
    last = positions.to(torch.int32)
    if window is not None:
        first = (last - (window - 1)).clamp_(min=0)
    elif chunk is not None:
        first = last - last % chunk
    else:
        first = torch.zeros_like(last)
    return torch.stack([first, last], -1)


def selective_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of S queries, each over its own span of the N keys; memory O(S + N).

    Online softmax in tiles, as FlashAttention (arXiv:2205.14135); keys beyond the spans of all queries of a tile are not read. It
    is fastest where the queries are in the order of their positions.

    Args:
        query: ``[H, S, D]``; H a multiple of K.
        key: ``[K, N, D]``.
        value: ``[K, N, Dv]``.
        spans: ``[S, 2]`` int32, first and last key that each query sees, from :func:`key_spans`. A query that sees none gets zeros.
        scale: of the scores; ``D ** -0.5`` by default.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv:2408.00118).
        sinks: ``[H]``, a score a head that takes part in the softmax and has no value (gpt-oss).
        window: most keys that a query sees, where the caller knows it: a hint by which work is shared out. What is seen, spans say.
        impl: which implementation runs.

    Returns:
        ``[S, H, Dv]`` of the query's dtype.

    Raises:
        KernelError: shapes, dtypes or devices do not fit together, or ``impl`` cannot run here.
        MissingPackageError: ``impl`` names triton and it is not installed.
    """
    scoring = _scoring(query, key, value, spans, scale, softcap, sinks)
    if _implementation(impl, query, value) == "reference":
        return reference.selective_attention(query, key, value, spans, scoring)
    from ragkv.kernels.triton_impl.attention import selective_attention as fused

    return fused(query, key, value, spans, scoring, window=window)


def scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    weights: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`selective_attention`, and how much of it every key gets; no ``[S, N]`` matrix is made, and keys are read once more.

    Args:
        query: ``[H, S, D]``, a few: a question's tokens.
        key: ``[K, N, D]``.
        value: ``[K, N, Dv]``.
        spans: ``[S, 2]`` int32, see :func:`selective_attention`; so are the rest.
        weights: ``[S]`` fp32, by which the queries' attention is summed.
        scale: of the scores.
        softcap: of the scores.
        sinks: ``[H]``.
        impl: which implementation runs.

    Returns:
        ``[S, H, Dv]`` as of :func:`selective_attention`, and ``[N]`` fp32, the mean over heads: in all the weights' sum, less what
        the sinks take.

    Raises:
        KernelError, MissingPackageError: as :func:`selective_attention`.
    """
    scoring = _scoring(query, key, value, spans, scale, softcap, sinks)
    check_shape("weights", weights, [query.shape[1]], "[S]")
    require(weights.dtype == torch.float32, f"weights must be float32, got {weights.dtype}")
    require(weights.device == query.device, f"weights must be on {query.device}, got {weights.device}")
    if _implementation(impl, query, value) == "reference":
        return reference.scored_attention(query, key, value, spans, weights, scoring)
    from ragkv.kernels.triton_impl.scores import scored_attention as fused

    return fused(query, key, value, spans, weights, scoring)


def _scoring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Scoring:
    """What both operations take by name, once everything was checked that they share."""
    check_shape("query", query, [None, None, None], "[H, S, D]")
    heads, tokens, dim = query.shape
    check_shape("key", key, [None, None, dim], "[K, N, D]")
    check_shape("value", value, [key.shape[0], key.shape[1], None], "[K, N, Dv]")
    check_same("query, key and value", query=query, key=key, value=value)
    shared = key.shape[0] > 0 and heads % key.shape[0] == 0
    require(shared, f"query heads must be a multiple of kv heads, got {heads} and {key.shape[0]}")
    check_shape("spans", spans, [tokens, 2], "[S, 2]")
    require(spans.dtype == torch.int32, f"spans must be int32, got {spans.dtype}")
    require(spans.device == query.device, f"spans must be on {query.device}, got {spans.device}")
    require(softcap is None or softcap > 0, f"softcap must be positive, got {softcap}")
    if sinks is not None:
        check_shape("sinks", sinks, [heads], "[H]")
    return Scoring(dim**-0.5 if scale is None else scale, softcap, sinks)


def _implementation(impl: Impl, query: Tensor, other: Tensor) -> str:
    """Heads wider than the tiles go to the reference under "auto"."""
    widest = max(query.shape[2], other.shape[2])
    if widest > WIDEST_HEAD:
        require(impl != "triton", f"impl='triton' takes heads of up to {WIDEST_HEAD} dimensions, got {widest}")
        return implementation("reference", query.device)
    return implementation(impl, query.device, query.dtype)
