"""Looking at a prompt with its stored chunks at their places, before anything is recomputed.

L layers, H heads, N tokens of the prompt, R reusable tokens, S suffix tokens, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from ragkv.errors import MethodError, UnsupportedModelError
from ragkv.fusion.layout import Layout
from ragkv.fusion.passes import Pass
from ragkv.fusion.placement import Placement
from ragkv.fusion.plan import Plan
from ragkv.fusion.view import AVERAGED
from ragkv.kernels import KernelError, deviation, implementation
from ragkv.lazy import lazy
from ragkv.model.attention import eager_attention
from ragkv.model.cache import FusedCache
from ragkv.model.decoder import Decoder
from ragkv.model.kernel_attention import Scores, SpanBuilder, SpanRule
from ragkv.model.masks import for_model
from ragkv.model.rows import Rows


class Driver(Protocol):
    """Who may run the model."""

    decoder: Decoder
    piece_tokens: int

    def turn(self) -> AbstractContextManager[None]:
        """The model for this thread alone."""


class Looking(ABC):
    """A prompt's cache, and what can be seen in it once stored chunks stand at their places.

    Args:
        driver: of the model; never taken while KV are read.
        layout: the prompt.
        room_tokens: room that the cache keeps for an answer.
        cache: with what the layout says is held; a new one by default.

    Attributes:
        decoder: the model.
        cache: of the prompt.
        looked: what the suffix's attention was read from: ``"scored (triton)"``, ``"scored (reference)"`` or ``"eager"``; empty
            before :meth:`attention` was asked for.
    """

    def __init__(self, driver: Driver, layout: Layout, room_tokens: int, cache: FusedCache | None = None):
        self.decoder: Decoder = driver.decoder
        self.looked: str = ""
        self.layout: Layout = layout
        self._driver, self._seen = driver, dict[str, Tensor]()
        self.cache: FusedCache = driver.decoder.cache(layout.tokens + room_tokens) if cache is None else cache
        if cache is not None:
            cache.reserve(layout.held, layout.tokens + room_tokens)

    @property
    @abstractmethod
    def placement(self) -> Placement:
        """Puts the stored chunks into the cache."""

    @abstractmethod
    def watching(self) -> AbstractContextManager[Callable[[Rows], object]]:
        """A block that is given what runs rows of the prompt whose attention is watched, beside whatever else is run."""

    def attention(self, queries: str = "all") -> Tensor:
        """See :meth:`ragkv.View.attention`.

        Where the model's attention is one that :func:`ragkv.kernels.scored_attention` computes, no matrix of weights is made. Else
        the model's own eager attention shows its weights; not so where ``kernels`` were asked for by name.
        """
        if queries in self._seen:
            return self._seen[queries]
        decoder, rows = self.decoder, self.layout.suffix
        if not getattr(decoder.model, "_supports_attention_backend", False):
            raise MethodError(
                "this model's attention is not open to view, so no method that follows the question runs on it"
            )
        self.placement.ahead()
        with self.placement.beside():
            seen = self._look(rows, [len(rows) - 1 if each == "last" else 0 for each in AVERAGED[queries]])
        if len(seen) != len(decoder.layers):
            raise MethodError(
                f"{len(seen)} of {len(decoder.layers)} layers showed their attention, so no method that follows the question runs "
                "on this model"
            )
        self._seen[queries] = seen
        return seen

    @lazy
    def deviation(self) -> Tensor:
        """See :attr:`ragkv.View.deviation`."""
        decoder, layout, impl = self.decoder, self.layout, self.decoder.kernels
        self.placement.ahead()
        full = decoder.cache(layout.tokens)
        everything = torch.arange(layout.tokens, device=layout.ids.device)
        with self._driver.turn(), self.placement.beside(cache=full):
            Pass(decoder, full, layout, Plan(everything), self._driver.piece_tokens).logits()
        span = slice(layout.chunks_start, layout.suffix_start)
        scores = []
        for held, true in zip(self.cache.layers, full.layers, strict=True):
            keys = deviation(true.key_room[0, :, span], held.key_room[0, :, span], impl=impl)
            values = deviation(true.value_room[0, :, span], held.value_room[0, :, span], impl=impl)
            scores.append((_scaled(keys) + _scaled(values)).to(layout.ids.device))
        return torch.stack(scores)

    def _look(self, rows: Tensor, firsts: Sequence[int]) -> Tensor:
        """Every layer's attention ``[L, R]``: the mean of that of the rows from each of ``firsts`` on."""
        rules = self._rules()
        if rules is not None:
            try:
                return self._scored(rows, firsts, rules)
            except (KernelError, UnsupportedModelError):
                if self.decoder.kernels != "auto":
                    raise
        return self._eager(rows, firsts)

    def _rules(self) -> list[SpanRule] | None:
        """The attention of every layer as the kernels take it; ``None`` where model or layout do not allow it."""
        decoder = self.decoder
        if not self.layout.even:
            return None
        if decoder.spans is not None or implementation(decoder.kernels, decoder.device, decoder.dtype) == "triton":
            return decoder.spans  # asked for by name it is there; else the decoder has tried it, and may have refused
        return decoder.rules_as_spans()

    def _scored(self, rows: Tensor, firsts: Sequence[int], rules: list[SpanRule]) -> Tensor:
        """From what the kernel takes on its way."""
        total, layout = torch.zeros((), dtype=torch.float32, device=rows.device), self.layout
        chunks = slice(layout.chunks_start, layout.suffix_start)
        self.cache.set_length(layout.suffix_start)
        if len(rows) > self._driver.piece_tokens:
            self.cache.clear(rows)  # fixed shapes look at the slots of later parts too
        with self.watching() as run:
            for part, stop, weights in self._parts(rows, firsts):
                scores, spans = Scores(weights), SpanBuilder(rules, part, stop)
                asked = Rows(layout.ids[part], part, self.cache, spans, wanted=0, scores=scores)
                run(asked)
                # Where a forward failed beside others' rows, it was run again.
                total = total + scores.last(len(self.decoder.layers))[:, chunks]
                self.looked = asked.attention.replace("selective", "scored")
        return total

    def _eager(self, rows: Tensor, firsts: Sequence[int]) -> Tensor:
        """From the weights that the model's eager attention returns."""
        decoder, layout, seen = self.decoder, self.layout, list[Tensor]()
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        chunks = slice(layout.chunks_start, layout.suffix_start)

        def keep(module: nn.Module, args: object, output: object) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[-1] == stop:
                shown = weights[0, :, :, chunks].float().mean(0)
                seen.append((counts.to(shown.device) @ shown).to(rows.device))

        self.cache.set_length(layout.suffix_start)
        for part, stop, weights in self._parts(rows, firsts):
            counts = weights
            seen.clear()
            with self._driver.turn(), eager_attention(decoder.model, decoder.config):
                hooks = [child.register_forward_hook(keep) for layer in decoder.layers for child in layer.children()]
                try:
                    at, mask = layout.positions[part], None
                    if not layout.even:
                        mask = for_model(decoder.masks(at, stop, layout.positions[:stop]), decoder.config)
                    decoder.run(layout.ids[part], at, self.cache, mask)
                finally:
                    for hook in hooks:
                        hook.remove()
            total = total + (torch.stack(seen) if seen else rows.new_empty(0))
        self.looked = "eager"
        return total

    def _parts(self, rows: Tensor, firsts: Sequence[int]) -> Iterator[tuple[Tensor, int, Tensor]]:
        """The prompt's last rows, as many as one forward computes; the slot behind them; and how much each of them counts."""
        begin, at = self.layout.suffix_start, 0
        for part in rows.split(self._driver.piece_tokens):
            stop = at + len(part)
            weights = torch.zeros(len(part), dtype=torch.float32, device=rows.device)
            for first in firsts:
                weights[max(0, first - at) :] += 1 / ((len(rows) - first) * len(firsts))
            yield part, begin + stop, weights
            at = stop


def _scaled(score: Tensor) -> Tensor:
    return score / score.mean().clamp_min(torch.finfo(score.dtype).tiny) if len(score) else score
