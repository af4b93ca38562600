"""The scene of one prompt: what a method may look at before it chooses.

L layers, H heads, N tokens of the prompt, R reusable tokens, S suffix tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ragkv.errors import MethodError, UnsupportedModelError
from ragkv.fusion.layout import Layout
from ragkv.fusion.passes import Pass
from ragkv.kernels import KernelError, deviation, implementation, question_scores
from ragkv.model.attention import eager_attention
from ragkv.model.cache import FusedCache
from ragkv.model.decoder import Decoder
from ragkv.model.kernel_attention import SpanBuilder, SpanRule, kernel_attention, serves, span_rules
from ragkv.model.masks import for_model


class Once:
    """Places each layer's stored keys and values once, however often it is asked to.

    Attributes:
        seconds: that it took.
    """

    def __init__(self, place: Callable[[int], None]):
        self.seconds = 0.0
        self._place, self._done = place, set[int]()

    def __call__(self, layer: int) -> None:
        """Place a layer, unless that is done."""
        if layer not in self._done:
            begin = perf_counter()
            self._place(layer)
            self._done.add(layer)
            self.seconds += perf_counter() - begin


class Scene:
    """A prompt with its stored chunks at their places, seen before anything is recomputed.

    Args:
        decoder: the model.
        cache: of the prompt; stored KV are placed into it where a look needs them.
        layout: the prompt.
        piece_tokens: tokens that one forward computes at most.
        place: writes one layer's prefix and stored chunks to their slots in the cache.
        sensitivities: of each chunk's tokens; ``None`` where they were not measured.

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
        place: Callable[[int], None],
        sensitivities: Sequence[Tensor | None],
    ):
        self.layout, self.looked = layout, ""
        self._decoder, self._cache, self._piece_tokens, self._place = decoder, cache, piece_tokens, place
        self._sensitivities = sensitivities
        self._attention: dict[str, Tensor] = {}

    def sensitivity(self) -> Tensor:
        """``[R]`` how much each token's values change behind another text, measured when its document was read.

        Raises:
            MethodError: it was not measured for some chunk.
        """
        if any(found is None for found in self._sensitivities):
            raise MethodError("the sensitivity of some chunks was not measured: add them to an engine made with it")
        parts = [found for found in self._sensitivities if found is not None]
        return torch.cat([*parts, torch.empty(0)]).to(self.layout.ids.device)

    def attention(self, queries: str = "all") -> Tensor:
        """What the suffix looks at, over the chunks as they are stored and at its final position.

        Where the model's attention is one that :func:`ragkv.kernels.question_scores` computes, no matrix of weights is made. Else
        the model's own eager attention shows its weights; not so where ``kernels`` were asked for by name.

        Args:
            queries: mean over ``"all"`` suffix tokens, or the ``"last"`` one's alone.

        Returns:
            ``[L, R]`` attention, mean over heads.

        Raises:
            MethodError: the model does not show its attention.
        """
        if queries in self._attention:
            return self._attention[queries]
        decoder, rows = self._decoder, self.layout.suffix
        if not getattr(decoder.model, "_supports_attention_backend", False):
            raise MethodError(
                "this model's attention is not open to view, so no method that follows the question runs on it"
            )
        first = 0 if queries == "all" else len(rows) - 1
        self._cache.prepare = self._place
        try:
            seen = self._look(rows, first)
        finally:
            self._cache.prepare = None
        if len(seen) != len(decoder.layers):
            raise MethodError(
                f"{len(seen)} of {len(decoder.layers)} layers showed their attention, so no method that follows the question runs "
                "on this model"
            )
        self._attention[queries] = torch.stack(seen)
        return self._attention[queries]

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
        """The attention of every layer as the kernels take it; ``None`` where the model does not allow it."""
        decoder = self._decoder
        if decoder.spans is not None or implementation(decoder.kernels, decoder.device, decoder.dtype) == "triton":
            return decoder.spans  # asked for by name it is there; else the decoder has tried it, and may have refused
        return span_rules(decoder.rules, decoder.device) if serves(decoder.model, decoder.config) else None

    def _scored(self, rows: Tensor, first: int, rules: list[SpanRule]) -> list[Tensor]:
        """From question scores, which the kernel takes on the way."""
        decoder, seen = self._decoder, list[Tensor]()
        chunks = slice(self.layout.chunks_start, self.layout.suffix_start)

        def watch(query: Tensor, key: Tensor, spans: Tensor, **more: Any) -> None:
            mass = question_scores(query[:, first:], key, spans[first:], **more)
            seen.append(mass[chunks].to(rows.device) / (query.shape[0] * (len(rows) - first)))

        spans = for_model(SpanBuilder(rules, rows, self.layout.tokens), decoder.config)
        self._cache.set_length(self.layout.suffix_start)
        with kernel_attention(decoder.config, decoder.device, decoder.dtype, decoder.kernels, watch) as ran:
            decoder.run(self.layout.ids[rows], rows, self._cache, spans)
        self.looked = ran.replace("selective", "question_scores")
        return seen

    def _eager(self, rows: Tensor, first: int) -> list[Tensor]:
        """From the weights that the model's eager attention returns."""
        decoder, seen = self._decoder, list[Tensor]()
        chunks = slice(self.layout.chunks_start, self.layout.suffix_start)

        def keep(module: nn.Module, args: object, output: object) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[-1] == self.layout.tokens:
                seen.append(weights[0, :, first:, chunks].float().mean((0, 1)).to(rows.device))

        self._cache.set_length(self.layout.suffix_start)
        hooks = [child.register_forward_hook(keep) for layer in decoder.layers for child in layer.children()]
        try:
            with eager_attention(decoder.model, decoder.config):
                decoder.run(self.layout.ids[rows], rows, self._cache)
        finally:
            for hook in hooks:
                hook.remove()
        self.looked = "eager"
        return seen

    def deviation(self) -> Tensor:
        """Squared distance of the stored keys and values to those of a full prefill, which is run for it.

        Returns:
            ``[L, R]``, keys and values each scaled to a mean of 1 in their layer, and added.
        """
        layout, layers, impl = self.layout, len(self._decoder.layers), self._decoder.kernels
        for layer in range(layers):
            self._place(layer)
        full = self._decoder.cache(layout.tokens)
        everything = torch.arange(layout.tokens, device=layout.ids.device)
        Pass(self._decoder, full, layout, everything, self._piece_tokens).logits()
        span = slice(layout.chunks_start, layout.suffix_start)
        scores = []
        for held, true in zip(self._cache.layers, full.layers, strict=True):
            keys = deviation(true.key_room[0, :, span], held.key_room[0, :, span], impl=impl)
            values = deviation(true.value_room[0, :, span], held.value_room[0, :, span], impl=impl)
            scores.append(_scaled(keys) + _scaled(values))
        return torch.stack(scores)


def _scaled(score: Tensor) -> Tensor:
    return score / score.mean().clamp_min(torch.finfo(score.dtype).tiny) if len(score) else score
