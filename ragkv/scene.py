"""The scene of one prompt: what a method may look at before it chooses.

L layers, H heads, N tokens of the prompt, R reusable tokens, S suffix tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor, nn

from ragkv.attention import eager_attention
from ragkv.cache import FusedCache
from ragkv.errors import MethodError
from ragkv.kernels import deviation
from ragkv.layout import Layout
from ragkv.model import Decoder
from ragkv.passes import Pass


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
        self.layout = layout
        self._decoder, self._cache, self._piece_tokens, self._place = decoder, cache, piece_tokens, place
        self._sensitivities = sensitivities

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

        Args:
            queries: mean over ``"all"`` suffix tokens, or the ``"last"`` one's alone.

        Returns:
            ``[L, R]`` attention, mean over heads.

        Raises:
            MethodError: the model does not show its attention.
        """
        if not getattr(self._decoder.model, "_supports_attention_backend", False):
            raise MethodError(
                "this model's attention is not open to view, so no method that follows the question runs on it"
            )
        rows = self.layout.suffix
        seen: list[Tensor] = []
        span = slice(self.layout.chunks_start, self.layout.suffix_start)

        def keep(module: nn.Module, args: object, output: object) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[-1] == self.layout.tokens:
                taken = weights[0, :, :, span] if queries == "all" else weights[0, :, -1:, span]
                seen.append(taken.float().mean((0, 1)))

        inner = [child for layer in self._decoder.layers for child in layer.children()]
        hooks = [module.register_forward_hook(keep) for module in inner]
        try:
            with eager_attention(self._decoder.model, self._decoder.config):
                Pass(self._decoder, self._cache, self.layout, rows, len(rows), self._place).logits()
        finally:
            for hook in hooks:
                hook.remove()
        if len(seen) != len(self._decoder.layers):
            raise MethodError(
                f"{len(seen)} of {len(self._decoder.layers)} layers showed their attention, so no method that follows the "
                "question runs on this model"
            )
        return torch.stack(seen)

    def deviation(self) -> Tensor:
        """Squared distance of the stored keys and values to those of a full prefill, which is run for it.

        Returns:
            ``[L, R]``, keys and values each scaled to a mean of 1 in their layer, and added.
        """
        layout, layers = self.layout, len(self._decoder.layers)
        for layer in range(layers):
            self._place(layer)
        full = self._decoder.cache(layout.tokens)
        everything = torch.arange(layout.tokens, device=layout.ids.device)
        Pass(self._decoder, full, layout, everything, self._piece_tokens).logits()
        span = slice(layout.chunks_start, layout.suffix_start)
        scores = []
        for held, true in zip(self._cache.layers, full.layers, strict=True):
            keys = deviation(true.key_room[0, :, span], held.key_room[0, :, span])
            values = deviation(true.value_room[0, :, span], held.value_room[0, :, span])
            scores.append(_scaled(keys) + _scaled(values))
        return torch.stack(scores)


def _scaled(score: Tensor) -> Tensor:
    return score / score.mean().clamp_min(torch.finfo(score.dtype).tiny) if len(score) else score
