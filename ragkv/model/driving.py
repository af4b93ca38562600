"""A model's own forward over ragkv's caches: some tokens at some positions, with masks or what stands in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ragkv.kernels import Impl
from ragkv.model.attending import Masses, attending
from ragkv.model.attention import fusion_attention, grouped
from ragkv.model.cache import FusedCache, LayerSpec, cache_argument
from ragkv.model.kernel_attention import SpanBuilder, SpanRule, kernel_attention
from ragkv.model.linear import few_rows
from ragkv.model.masks import MaskBuilder, Rule, for_model
from ragkv.model.rows import Rows
from ragkv.model.turns import Turns


class Driving:
    """Runs a model; what it is, :class:`~ragkv.model.decoder.Decoder` says."""

    model: PreTrainedModel
    config: PreTrainedConfig
    turns: Turns
    layers: nn.ModuleList
    specs: list[LayerSpec]
    rules: list[Rule]
    spans: list[SpanRule] | None
    kernels: Impl
    device: torch.device
    dtype: torch.dtype
    backbone: nn.Module
    vocab_size: int
    keeps_last: bool
    wide: bool

    @property
    def attention(self) -> str:
        """The attention implementation that the model was loaded with."""
        return self.config._attn_implementation

    def cache(self, capacity: int) -> FusedCache:
        """An empty cache with room for ``capacity`` tokens."""
        return FusedCache(self.specs, capacity)

    @torch.no_grad()
    def read(self, ids: Tensor, cache: FusedCache, start: int, masses: Masses | None = None) -> Tensor:
        """Run ``ids [S]`` behind what the cache holds, for their keys and values; no logits are computed.

        Args:
            ids: token ids on the model's device.
            cache: appended to.
            start: position of the first token.
            masses: takes what they attend to; its ``slots`` are theirs.

        Returns:
            The last hidden states ``[S, hidden size]``.
        """
        positions, masks = torch.arange(start, start + len(ids), device=self.device), self.behind(cache, len(ids))
        if masks is None:
            with self.turns, attending(self.layers, self.config, masses):
                return self.run(ids, positions, cache)
        with self.fusion_attention(scattered=True, masses=masses):
            return self.run(ids, positions, cache, for_model(masks, self.config))

    @torch.no_grad()
    def run(self, ids: Tensor, positions: Tensor, cache: FusedCache, mask: Any = None) -> Tensor:
        """Run ``ids [S]`` at ``positions [S]`` and return the last hidden states ``[S, hidden size]``."""
        return self.out(self.backbone, ids, positions, cache, mask)[0][0]

    @torch.no_grad()
    def step(self, ids: Tensor, positions: Tensor, cache: FusedCache, mask: Any = None, rows: int = 1) -> Tensor:
        """Run ``ids [S]`` at ``positions [S]`` and return the next-token logits ``[rows, V]`` of the last ones."""
        keep = {"logits_to_keep": rows} if self.keeps_last else {}
        return self.out(self.model, ids, positions, cache, mask, **keep).logits[0, -rows:]

    def out(self, module: nn.Module, ids: Tensor, positions: Tensor, cache: Cache, mask: Any, **more: Any) -> Any:
        """What the model, or its backbone, gives for ``ids [S]`` at ``positions [S]``."""
        with self.turns, self.few_rows(len(ids)):
            return module(
                input_ids=ids[None],
                position_ids=positions[None],
                attention_mask=mask,
                use_cache=True,
                **{cache_argument(type(module).forward): cache},
                **more,
            )

    def few_rows(self, rows: int) -> AbstractContextManager[object]:
        """A block in which a pass of so many rows is computed in the order that is faster for few."""
        return few_rows(rows, self.device, self.model.dtype) if self.wide else nullcontext()

    def forward(self, rows: Rows) -> Tensor:
        """Run rows of one prompt; returns the next-token logits ``[W, V]`` of the last ones, as many as are wanted."""
        masks = rows.masks
        if masks is None and not rows.limited:
            masks = self.behind(rows.cache, len(rows))
        with self._attention_of(rows, scattered=masks is not None) as rows.attention:
            mask = None if masks is None else for_model(masks, self.config)
            if rows.wanted:
                return self.step(rows.ids, rows.positions, rows.cache, mask, rows=rows.wanted)
            return self.run(rows.ids, rows.positions, rows.cache, mask)[:0]

    def _attention_of(self, rows: Rows, scattered: bool) -> AbstractContextManager[str]:
        if rows.scores is not None:
            return kernel_attention(self.config, self.device, self.dtype, self.kernels, rows.scores)
        return self.fusion_attention(scattered=scattered, limited=rows.limited, masses=rows.masses)

    def behind(self, cache: FusedCache, tokens: int) -> SpanBuilder | None:
        """Spans for so many rows right behind what a cache holds; ``None``: the model's own attention is as good, or all there is.

        Left to itself transformers makes a mask ``[S, N]`` for such rows, and for any rows of a layer with a window, and sdpa then
        repeats keys and values for every query head. A single row, and rows with nothing in front, take neither.
        """
        held = cache.layers[0].length
        if self.spans is None or self.attention not in ("eager", "sdpa"):
            return None
        if (tokens == 1 or not held) and all(rule.whole(held + tokens) for rule in self.spans):
            return None
        return SpanBuilder(self.spans, torch.arange(held, held + tokens, device=self.device), held + tokens)

    def masks(
        self, positions: Tensor, keys: int, key_positions: Tensor | None = None, open_keys: Tensor | None = None
    ) -> MaskBuilder | SpanBuilder:
        """Masks for scattered queries at ``positions [S]`` over the keys in N slots, or what stands in their place.

        Args:
            positions: of the queries.
            keys: N.
            key_positions: ``[N]`` position of the key in each slot, where that is not the slot itself; only masks can say so.
            open_keys: ``[S, N]`` false where a query may not see a key, whatever the model's rule says; only masks can say so.
        """
        if self.spans is not None and open_keys is None and key_positions is None:
            return SpanBuilder(self.spans, positions, keys)
        if key_positions is None:
            key_positions = torch.arange(keys, device=positions.device)
        additive = self.attention != "sdpa" or grouped(self.model, self.config)
        return MaskBuilder(self.rules, positions, key_positions, self.model.dtype, additive, open_keys)

    @contextmanager
    def fusion_attention(
        self, *, scattered: bool, limited: bool = False, masses: Masses | None = None
    ) -> Iterator[str]:
        """The attention of one pass, which is one turn; yields its name.

        Selective attention where it can run, else :mod:`ragkv.model.attention`'s.

        Args:
            scattered: queries do not stand one behind the other at the end.
            limited: what a query sees is no run of slots: keys are hidden from it, or positions do not run evenly with the slots.
            masses: takes what is attended to.
        """
        if scattered and self.spans is not None and not limited:
            switched = kernel_attention(self.config, self.device, self.dtype, self.kernels)
        else:
            switched = fusion_attention(self.model, self.config, scattered)
        with switched as name, attending(self.layers, self.config, masses):
            yield name

    def random_ids(self, tokens: int) -> Tensor:
        """``[S]`` ids to try the model with, always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.vocab_size, (tokens,), generator=generator, device="cpu").to(self.device)
