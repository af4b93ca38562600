"""The model's own attention rules, evaluated at scattered positions.

transformers builds masks for queries that stand one behind the other at the end of the cache. Fusion's queries are scattered,
so the rule itself (causal, window, attention chunk) is taken from transformers' mask builders and evaluated where queries and keys
really stand: a token at position p sees the keys at positions <= p inside its layer's window, in whatever slots they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    AttentionMaskInterface,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from ragkv.model.cache import cache_argument

#: (batch, head, query position, key position) -> may the query see the key; broadcasts over tensors.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_RECORDER = "ragkv_rule"
_BUILDERS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "chunked_attention": create_chunked_causal_mask,
}


def layer_rules(config: PreTrainedConfig, layers: int, device: torch.device) -> list[Rule]:
    """The attention rule of every layer, as transformers builds it from the config.

    Args:
        config: the text config of a decoder.
        layers: L.
        device: where the rules' own tensors shall live.
    """
    # The builders hand their rule to whatever mask interface the config names; ours returns it instead of a mask.
    probe = copy(config)
    probe._attn_implementation_internal = _RECORDER
    registry = AttentionMaskInterface._global_mapping
    registry[_RECORDER] = lambda *, mask_function, **kwargs: mask_function
    kinds = list(getattr(config, "layer_types", None) or [_only_kind(config)] * layers)[:layers]
    one = torch.empty(1, 1, 1, device=device)
    try:
        rules = {
            kind: build(config=probe, inputs_embeds=one, attention_mask=None, **{cache_argument(build): None})
            for kind, build in _BUILDERS.items()
            if kind in kinds
        }
    finally:
        registry.pop(_RECORDER, None)
    return [rules[kind] for kind in kinds]


def _only_kind(config: PreTrainedConfig) -> str:
    """The kind of all layers, where the config does not list them."""
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(config, "attention_chunk_size", None) is None else "chunked_attention"


class LayerMasks(Protocol):
    """What a model's layers are given as masks."""

    def layer(self, layer: int) -> Tensor | None:
        """One layer's."""


class MaskBuilder:
    """Masks for one set of queries, made once per distinct rule.

    Args:
        rules: one rule a layer.
        positions: ``[S]`` positions of the queries.
        key_positions: ``[N]`` position of the key in each slot.
        dtype: of the model's activations, used where ``additive``.
        additive: float masks (0 or the dtype's minimum), as eager attention takes them, instead of boolean ones.
        open_keys: ``[S, N]`` false where a query may not see a key even though the rule lets it; all true if not given.
    """

    def __init__(
        self,
        rules: list[Rule],
        positions: Tensor,
        key_positions: Tensor,
        dtype: torch.dtype,
        additive: bool,
        open_keys: Tensor | None = None,
    ):
        self.rules: list[Rule] = rules
        self.positions: Tensor = positions
        self.key_positions: Tensor = key_positions
        self.dtype: torch.dtype = dtype
        self.additive: bool = additive
        self.open_keys: Tensor | None = open_keys
        self._made: dict[int, Tensor] = {}

    def layer(self, layer: int) -> Tensor:
        """``[1, 1, S, N]``, true (or 0) where the query may see the key."""
        rule = self.rules[layer]
        if id(rule) not in self._made:
            self._made[id(rule)] = self._make(rule)
        return self._made[id(rule)]

    def _make(self, rule: Rule) -> Tensor:
        at, keys = self.positions, self.key_positions
        zero = torch.zeros((), dtype=torch.long, device=at.device)
        mask = rule(zero, zero, at[None, None, :, None], keys[None, None, None, :])
        mask = mask.expand(1, 1, len(at), len(keys)).contiguous()
        if self.open_keys is not None:
            mask = mask & self.open_keys
        if not self.additive:
            return mask
        hidden = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device)
        return hidden.masked_fill_(~mask, torch.finfo(self.dtype).min)


@dataclass(frozen=True)
class SameMask:
    """One mask for all layers."""

    mask: Tensor

    def layer(self, layer: int) -> Tensor:
        """It."""
        return self.mask


def for_model(masks: LayerMasks, config: PreTrainedConfig) -> Tensor | dict[str, Tensor | None] | None:
    """The masks in the form in which the model's forward takes ready-made ones: a tensor, or one a layer type."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return masks.layer(0)
    return {kind: masks.layer(kinds.index(kind)) for kind in set(kinds)}
