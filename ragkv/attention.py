"""Attention for the one pass of a fusion: few queries, many keys, a mask.

H query heads in G groups of one kv head each, S queries, N keys, D head_dim.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_GROUPED = "ragkv_grouped_sdpa"
_registered = threading.Lock()


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention without its copies of all keys and values for every query head.

    With a mask, transformers repeats keys and values G times. Here the G queries that share a kv head become G x S queries of one
    head; the sums are the same.

    Args:
        module: the attention module.
        query: ``[B, H, S, D]``.
        key: ``[B, H / G, N, D]``.
        value: ``[B, H / G, N, D]``.
        attention_mask: ``[B, 1, S, N]`` or ``None``.
        dropout: passed on.
        scaling: of the scores.
        **kwargs: passed on where transformers' own function runs.
    """
    batch, heads, queries, dim = query.shape
    groups = heads // key.shape[1]
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    if attention_mask is None or attention_mask.shape[1] != 1 or groups == 1 or special:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], groups * queries, dim),
        key,
        value,
        attn_mask=attention_mask[..., : key.shape[2]].repeat(1, 1, groups, 1),
        dropout_p=dropout,
        scale=scaling,
    )
    return out.reshape(batch, heads, queries, value.shape[3]).transpose(1, 2).contiguous(), None


@contextmanager
def fusion_attention(model: PreTrainedModel, config: PreTrainedConfig, scattered: bool) -> Iterator[str]:
    """The attention of one pass; what the model was loaded with is put back whatever happens. Yields its name.

    sdpa runs without transformers' copies. Flash and flex attention know no scattered queries: for those the model's eager
    attention serves, with its own soft caps, sinks and windows.

    Args:
        model: the decoder.
        config: its text config.
        scattered: the pass needs a mask of its own.
    """
    loaded = config._attn_implementation
    if loaded == "sdpa" and getattr(model, "_supports_attention_backend", False):
        with _registered:  # names of our own, for good: nothing that was there changes
            AttentionInterface.register(_GROUPED, grouped_sdpa)
            AttentionMaskInterface.register(_GROUPED, sdpa_mask)
        config._attn_implementation = _GROUPED
        try:
            yield loaded
        finally:
            config._attn_implementation = loaded
    elif loaded in ("eager", "sdpa") or not scattered:
        yield loaded
    else:
        model.set_attn_implementation("eager")
        try:
            yield "eager"
        finally:
            model.set_attn_implementation(loaded)
