"""Attention for the pass of a fusion, few queries, many keys, a mask, and for the tokens behind it.

B sequences, H query heads, K kv heads, S queries, N keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from ragkv.model.turns import turns

_GROUPED = "ragkv_grouped_sdpa"
_names = count()
_FEW = 16  # queries; for more of them the mask's rows are not repeated for every head


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention without its copies of all keys and values for every query head.

    As soon as there is a mask, transformers repeats keys and values H / K times, because CUDA's kernels want them so. The CPU's
    does not; and it takes a float mask as it is, where it turns a boolean one into floats again in every layer. It works on
    rows of queries: the heads that share keys and values are rows beside each other where there are few queries, which is
    up to 30 times faster for a single one.

    Args:
        module: the attention module.
        query: ``[B, H, S, D]``.
        key: ``[B, K, N, D]``.
        value: ``[B, K, N, D]``.
        attention_mask: float ``[B, 1, S, N]``, or ``[B, H, S, N]`` where a model makes one for each head; ``None``: causal, which
            for a single query is no mask at all.
        dropout: passed on.
        scaling: of the scores.
        **kwargs: passed on where transformers' own function runs.
    """
    (batch, heads, queries, width), groups = query.shape, key.shape[1]
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    if special or (attention_mask is None and queries > 1):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    shared = heads // groups
    if queries <= _FEW and shared > 1:
        query = query.reshape(batch, groups, shared * queries, width)
        if attention_mask is not None and attention_mask.shape[1] == heads:
            attention_mask = attention_mask.reshape(len(attention_mask), groups, shared * queries, -1)
        elif attention_mask is not None and queries > 1:
            attention_mask = attention_mask.repeat(1, 1, shared, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != groups,
    )
    return out.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


def _mask(*, q_length: int, **kwargs: Any) -> Tensor | None:
    """A float mask; ``None`` for a single query that sees all keys."""
    if q_length == 1 and sdpa_mask(q_length=q_length, **kwargs) is None:
        return None
    return eager_mask(q_length=q_length, **kwargs)


def grouped(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    """Whether :func:`grouped_sdpa` takes the place of what a model was loaded with."""
    # Models that do not go through transformers' attention interface ask for "sdpa" by name.
    interface = getattr(model, "_supports_attention_backend", False)
    return config._attn_implementation == "sdpa" and interface and model.device.type == "cpu"


@contextmanager
def switched(config: PreTrainedConfig, kind: str, attend: Any, mask: Any = None) -> Iterator[None]:
    """A block in which a model attends by another function, under a name of this block alone; nothing of it is left behind.

    Args:
        config: its text config.
        kind: what the name says.
        attend: as transformers' attention interface takes it.
        mask: makes the masks for it, as transformers takes it; ``None`` where they are handed in.
    """
    loaded, name = config._attn_implementation, f"ragkv_{kind}_{next(_names)}"
    AttentionInterface.register(name, attend)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = loaded
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


@contextmanager
def eager_attention(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[None]:
    """The model's own eager attention, which returns its weights, for one turn; what was there is put back whatever happens."""
    with turns(config):
        loaded = config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            yield
        finally:
            model.set_attn_implementation(loaded)


@contextmanager
def fusion_attention(model: PreTrainedModel, config: PreTrainedConfig, scattered: bool) -> Iterator[str]:
    """The attention of one pass, or of one token, for one turn; what was there is put back whatever happens. Yields its name.

    On the CPU sdpa runs without transformers' copies. Flash and flex attention know no scattered queries: for those the model's
    eager attention serves, with its own soft caps, sinks and windows.

    Args:
        model: the decoder.
        config: its text config.
        scattered: the pass needs a mask of its own.
    """
    with turns(config):
        loaded = config._attn_implementation
        if grouped(model, config):
            AttentionInterface.register(_GROUPED, grouped_sdpa)  # a name of our own: nothing that was there changes
            AttentionMaskInterface.register(_GROUPED, _mask)
            config._attn_implementation = _GROUPED
            try:
                yield loaded
            finally:
                config._attn_implementation = loaded
        elif loaded in ("eager", "sdpa") or not scattered:
            yield loaded
        else:
            with eager_attention(model, config):
                yield "eager"
