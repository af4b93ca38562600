"""Looking at a prompt with its stored chunks at their places, before anything is recomputed.

L layers, H heads, N tokens of the prompt, R reusable tokens, S suffix tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ragkv.errors import MethodError, UnsupportedModelError
from ragkv.fusion.layout import Layout
from ragkv.fusion.passes import Pass
from ragkv.fusion.placement import Placement
from ragkv.kernels import KernelError, deviation, implementation, question_scores
from ragkv.model.attention import eager_attention
from ragkv.model.cache import FusedCache
from ragkv.model.decoder import Decoder
from ragkv.model.kernel_attention import SpanBuilder, SpanRule, kernel_attention, serves, span_rules
from ragkv.model.masks import for_model

#: The right to run the model, one at a time.
Turn = Callable[[], AbstractContextManager[Any]]


class Looking:
    """Answers a :class:`~ragkv.View`'s questions, all but those about the model alone.

    Args:
        decoder: the model.
        cache: of the prompt; stored KV are placed into it where a look needs them.
        layout: the prompt.
        piece_tokens: tokens that one forward computes at most.
        opened: the prompt's placement, opened when it is first asked for.
        turn: taken while the model runs; never while KV are read.
        sensitivity: answers :meth:`ragkv.fusion.view.Looks.sensitivity`.
        check_layer: answers :meth:`ragkv.fusion.view.Looks.check_layer`.

    Attributes:
        looked: what the suffix's attention was read from: ``"question_scores (triton)"``, ``"question_scores (reference)"`` or
            ``"eager"``; empty before :meth:`attention` was asked for.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: FusedCache,
        layout: Layout,
        piece_tokens: int,
        opened: Callable[[], Placement],
        turn: Turn,
        sensitivity: Callable[[], list[Tensor | None]],
        check_layer: Callable[[], int],
    ):
        self.looked, self.sensitivity, self.check_layer = "", sensitivity, check_layer
        self._decoder, self._cache, self._layout, self._piece_tokens = decoder, cache, layout, piece_tokens
        self._opened, self._turn = opened, turn

    def attention(self, queries: str) -> Tensor:
        """The suffix's attention ``[L, R]`` to the chunks as they are stored.

        Where the model's attention is one that :func:`ragkv.kernels.question_scores` computes, no matrix of weights is made. Else
        the model's own eager attention shows its weights; not so where ``kernels`` were asked for by name.
        """
        decoder, rows = self._decoder, self._layout.suffix
        if not getattr(decoder.model, "_supports_attention_backend", False):
            raise MethodError(
                "this model's attention is not open to view, so no method that follows the question runs on it"
            )
        placement = self._opened()
        placement.ahead()
        with self._turn(), placement.beside():
            seen = self._look(rows, 0 if queries == "all" else len(rows) - 1)
        if len(seen) != len(decoder.layers):
            raise MethodError(
                f"{len(seen)} of {len(decoder.layers)} layers showed their attention, so no method that follows the question runs "
                "on this model"
            )
        return torch.stack(seen)

    def deviation(self) -> Tensor:
        """``[L, R]`` squared distance of stored keys and values to a full prefill's, each scaled to a mean of 1, added."""
        decoder, layout, impl = self._decoder, self._layout, self._decoder.kernels
        placement = self._opened()
        placement.ahead()
        full = decoder.cache(layout.tokens)
        everything = torch.arange(layout.tokens, device=layout.ids.device)
        with self._turn(), placement.beside():
            Pass(decoder, full, layout, everything, self._piece_tokens).logits()
        span = slice(layout.chunks_start, layout.suffix_start)
        scores = []
        for held, true in zip(self._cache.layers, full.layers, strict=True):
            keys = deviation(true.key_room[0, :, span], held.key_room[0, :, span], impl=impl)
            values = deviation(true.value_room[0, :, span], held.value_room[0, :, span], impl=impl)
            scores.append((_scaled(keys) + _scaled(values)).to(layout.ids.device))
        return torch.stack(scores)

    def _look(self, rows: Tensor, first: int) -> list[Tensor]:
        """Every layer's attention ``[R]`` of the rows from ``first`` on."""
        rules = self._rules()
        if rules is not None:
            try:
                return self._scored(rows, first, rules)
            except (KernelError, UnsupportedModelError):
                if self._decoder.kernels != "auto":
                    raise
        return self._eager(rows, first)

    def _rules(self) -> list[SpanRule] | None:
        """The attention of every layer as the kernels take it; ``None`` where model or layout do not allow it."""
        decoder = self._decoder
        if not self._layout.even:
            return None
        if decoder.spans is not None or implementation(decoder.kernels, decoder.device, decoder.dtype) == "triton":
            return decoder.spans  # asked for by name it is there; else the decoder has tried it, and may have refused
        return span_rules(decoder.rules, decoder.device) if serves(decoder.model, decoder.config) else None

    def _scored(self, rows: Tensor, first: int, rules: list[SpanRule]) -> list[Tensor]:
        """From question scores, which the kernel takes on the way."""
        decoder, seen = self._decoder, list[Tensor]()
        chunks = slice(self._layout.chunks_start, self._layout.suffix_start)

        def watch(query: Tensor, key: Tensor, spans: Tensor, **more: Any) -> None:
            mass = question_scores(query[:, first:], key, spans[first:], **more)
            seen.append(mass[chunks].to(rows.device) / (query.shape[0] * (len(rows) - first)))

        spans = for_model(SpanBuilder(rules, rows, self._layout.tokens), decoder.config)
        self._cache.set_length(self._layout.suffix_start)
        with kernel_attention(decoder.config, decoder.device, decoder.dtype, decoder.kernels, watch) as ran:
            decoder.run(self._layout.ids[rows], rows, self._cache, spans)
        self.looked = ran.replace("selective", "question_scores")
        return seen

    def _eager(self, rows: Tensor, first: int) -> list[Tensor]:
        """From the weights that the model's eager attention returns."""
        decoder, layout, seen = self._decoder, self._layout, list[Tensor]()
        chunks = slice(layout.chunks_start, layout.suffix_start)

        def keep(module: nn.Module, args: object, output: object) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[-1] == layout.tokens:
                seen.append(weights[0, :, first:, chunks].float().mean((0, 1)).to(rows.device))

        self._cache.set_length(layout.suffix_start)
        hooks = [child.register_forward_hook(keep) for layer in decoder.layers for child in layer.children()]
        try:
            with eager_attention(decoder.model, decoder.config):
                at, mask = layout.positions[rows], None
                if not layout.even:
                    mask = for_model(decoder.masks(at, layout.tokens, layout.positions), decoder.config)
                decoder.run(layout.ids[rows], at, self._cache, mask)
        finally:
            for hook in hooks:
                hook.remove()
        self.looked = "eager"
        return seen


def _scaled(score: Tensor) -> Tensor:
    return score / score.mean().clamp_min(torch.finfo(score.dtype).tiny) if len(score) else score
