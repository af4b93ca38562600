"""How many tokens one forward may take: what the model holds of each while it runs, against what its device has free.

H query heads, D head_dim, N tokens that they see.
"""

from __future__ import annotations

from typing import Any

from ragkv.model.decoder import Decoder
from ragkv.model.inspection import each_layers

#: Tokens of a forward, at least and at most: fewer keep a GPU waiting for Python, more bring nothing.
LEAST, MOST = 512, 8192
_SHARE = 4  # prompts' caches and the allocator's gaps take the rest of what is free
_LONGEST = 32768  # N that is counted on, where the model has more positions


def piece_tokens(decoder: Decoder, free_bytes: int) -> int:
    """Tokens of a forward: on a GPU a power of two between 512 and 8192 that takes a quarter of the free memory; else 512.

    Args:
        decoder: the model.
        free_bytes: what its device has left; of several, the fullest.
    """
    if decoder.device.type != "cuda":
        return LEAST
    fitting = max(1, (free_bytes // _SHARE - seen_bytes(decoder)) // token_bytes(decoder))
    return max(LEAST, min(MOST, 1 << (fitting.bit_length() - 1)))


def token_bytes(decoder: Decoder) -> int:
    """What a forward holds of one token at most, counted generously: a layer's activations, and its row of the mask.

    Eager attention holds a row of weights for every head besides. What it holds of all tokens that are seen is :func:`seen_bytes`.
    """
    config, size = decoder.config, decoder.dtype.itemsize
    hidden, heads = config.hidden_size, config.num_attention_heads
    key_dim = max(spec.key_dim for spec in decoder.specs)
    stored = max(spec.token_bytes for spec in decoder.specs)
    residual = hidden * (3 * size + 4)  # with its norm, which is computed in fp32
    # Queries, turned ones and what comes out; keys and values, and turned.
    attention = 3 * heads * key_dim * size + 2 * stored
    mask = _positions(decoder) * (1 + size)
    weights = heads * _positions(decoder) * (4 + size) if decoder.attention == "eager" else 0
    return residual + attention + 3 * _inner(config) * size + mask + weights


def seen_bytes(decoder: Decoder) -> int:
    """What a layer holds of all tokens that are seen: keys and values, once more for every query head."""
    heads = decoder.config.num_attention_heads
    return _positions(decoder) * max(spec.token_bytes * heads // spec.heads for spec in decoder.specs)


def _positions(decoder: Decoder) -> int:
    return min(decoder.max_positions or _LONGEST, _LONGEST)


def _inner(config: Any) -> int:
    """The width between a layer's last two matrices; of a mixture, of the experts that a token goes to."""
    names = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "intermediate_size_mlp")
    widths = [width for name in names for width in each_layers(config, name) if isinstance(width, int)]
    inner = max(widths, default=4 * config.hidden_size)
    experts = getattr(config, "num_experts_per_tok", None) or getattr(config, "num_experts_per_token", None) or 0
    return max(inner, experts * (getattr(config, "moe_intermediate_size", None) or inner))
