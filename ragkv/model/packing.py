"""Rows of several prompts in one forward: what works token by token is shared, and each prompt's rows attend to its own keys.

Iteration-level batching as in Orca (OSDI'22): prompts of any length and stage go side by side, without padding. No model is named:
the fresh keys and values of a packed forward are handed to each prompt's own cache, and attention is called once for each of them.

S rows of one prompt, N keys that they are shown, V vocabulary, W rows whose logits are wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ragkv.kernels import implementation
from ragkv.kernels.upload import sent
from ragkv.model.attention import grouped, grouped_sdpa, switched
from ragkv.model.decoder import Decoder
from ragkv.model.kernel_attention import KernelAttention, SpanBuilder, SpanRule, span_rules
from ragkv.model.masks import LayerMasks, MaskBuilder, SameMask, for_model
from ragkv.model.rope import relative_error
from ragkv.model.rows import Rows

_TRIED_TOKENS = 24


@torch.no_grad()
def packs(decoder: Decoder) -> bool:
    """Whether rows of several prompts go through one forward of a model: tried, beside running them one by one."""
    if not decoder.hands_on:
        return False  # its attention is not called by transformers' attention interface, or not with our masks
    with decoder.turns:
        want, got = [decoder.forward(rows) for rows in _samples(decoder)], run_packed(decoder, _samples(decoder))
    errors = [relative_error(b, a) for a, b in zip(want, got, strict=True)]
    return decoder.tolerance().holds(max(errors), decoder.dtype)


def _samples(decoder: Decoder) -> list[Rows]:
    """Rows of a few prompts: one behind some tokens, several behind some, and a whole prompt."""
    limit = min(_TRIED_TOKENS, decoder.max_positions or _TRIED_TOKENS)
    ids, at = decoder.random_ids(limit), torch.arange(limit, device=decoder.device)
    samples = []
    for start, end in ((limit - 1, limit), (limit // 2, limit), (0, max(1, limit // 3))):
        cache = decoder.cache(limit)
        if start:
            decoder.run(ids[:start], at[:start], cache)
        samples.append(Rows(ids[start:end], at[start:end], cache))
    return samples


@torch.no_grad()
def run_packed(decoder: Decoder, parts: Sequence[Rows]) -> list[Tensor]:
    """Run rows of several prompts in one forward.

    Args:
        decoder: the model, where it :func:`packs`.
        parts: of different caches.

    Returns:
        For each the next-token logits ``[W, V]`` of its last rows, as many as are wanted.
    """
    ends = list(accumulate(map(len, parts)))
    last = [at for end, part in zip(ends, parts, strict=True) for at in range(end - part.wanted, end)]
    wanted = torch.tensor(last, dtype=torch.long, device="cpu")  # sent from there, for which nobody waits
    with _attention(decoder, parts, ends) as (cache, mask):
        ids, positions = torch.cat([part.ids for part in parts]), torch.cat([part.positions for part in parts])
        keep = {"logits_to_keep": sent(wanted, ids.device)} if last and decoder.keeps_last else {}
        out = decoder.out(decoder.model if last else decoder.backbone, ids, positions, cache, mask, **keep)
    if not last:
        return [out[0][0, :0] for _ in parts]
    logits = out.logits[0] if keep else out.logits[0].index_select(0, sent(wanted, out.logits.device))
    return list(logits.split([part.wanted for part in parts]))


class _Packed(Cache):
    """Stands where the model expects one prompt's cache, and hands each prompt its own rows.

    Attributes:
        shown: keys and values ``[1, H, N, D]`` of each prompt, in the layer at hand.
    """

    def __init__(self, parts: Sequence[Rows], ends: Sequence[int]):
        super().__init__(layers=[])
        self.parts, self.spans = parts, list(pairwise((0, *ends)))
        self.layer, self.shown = 0, list[tuple[Tensor, Tensor]]()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take fresh ``[1, H, S, D]`` of all prompts' rows."""
        self.layer = layer_idx
        self.shown = [
            part.cache.update(key_states[:, :, a:b], value_states[:, :, a:b], layer_idx)
            for part, (a, b) in zip(self.parts, self.spans, strict=True)
        ]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: ready-made masks say what is seen."""
        return 0


class _Attention:
    """Attention of a packed forward: what each prompt's rows would be given alone."""

    def __init__(self, decoder: Decoder, cache: _Packed, masks: Sequence[LayerMasks]):
        self.cache, self.masks, self.loaded = cache, masks, decoder.attention
        self.grouped = grouped(decoder.model, decoder.config)
        impl = implementation(decoder.kernels, decoder.device, decoder.dtype)
        eager = "sdpa" if self.loaded == "sdpa" else "eager"
        self.kernels = [
            KernelAttention(impl, part.scores)
            if part.scores is not None or (decoder.spans is not None and not part.limited)
            else None
            for part in cache.parts
        ]
        for part, kernel in zip(cache.parts, self.kernels, strict=True):
            part.attention = eager if kernel is None else f"selective ({impl})"

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Takes query ``[1, H, S, D]`` of all rows; returns ``[1, S, H, D]``."""
        cache, outs = self.cache, []
        for kernel, (a, b), shown, masks in zip(self.kernels, cache.spans, cache.shown, self.masks, strict=True):
            own = kernel or self._own(module)
            outs.append(own(module, query[:, :, a:b], *shown, masks.layer(cache.layer), **kwargs)[0])
        return torch.cat(outs, 1), None

    def _own(self, module: nn.Module) -> Any:
        if self.loaded == "sdpa":
            return grouped_sdpa if self.grouped else sdpa_attention_forward
        return sys.modules[type(module).__module__].eager_attention_forward


class _Behind:
    """Masks of rows right behind what a cache holds; none where one row sees all of it."""

    def __init__(self, decoder: Decoder, rows: Rows, rules: Sequence[SpanRule] | None):
        self._rows, self._rules = rows, rules if decoder.attention == "sdpa" else None
        self._end = rows.held + len(rows)
        slots = torch.arange(rows.held, self._end, device=decoder.device)  # chunks may stand apart, at other positions
        self._masks: MaskBuilder | SpanBuilder = decoder.masks(slots, self._end)

    def layer(self, layer: int) -> Tensor | None:
        """One layer's."""
        if len(self._rows) == 1 and self._rules is not None and self._rules[layer].whole(self._end):
            return None
        return self._masks.layer(layer)


@contextmanager
def _attention(decoder: Decoder, parts: Sequence[Rows], ends: Sequence[int]) -> Iterator[tuple[_Packed, Any]]:
    """A cache and a mask for the model, while its attention goes prompt by prompt; what was there is put back whatever happens."""
    with decoder.turns:
        rules = span_rules(decoder.rules, decoder.device)
        masks = [part.masks or _Behind(decoder, part, rules) for part in parts]
        cache = _Packed(parts, ends)
        nothing = torch.zeros(1, 1, ends[-1], 1, dtype=decoder.dtype, device=decoder.device)
        with switched(decoder.config, "packed", _Attention(decoder, cache, masks)):
            yield cache, for_model(SameMask(nothing), decoder.config)
