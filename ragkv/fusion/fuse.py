"""The heart: stored keys and values are placed, and the model's own forward recomputes the tokens that a method asks for.

L layers, H kv heads, N tokens of the prompt, S tokens being computed, R reusable ones among them, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ragkv.errors import MethodError
from ragkv.fusion.layout import Layout
from ragkv.fusion.passes import Pass, Trace
from ragkv.kernels import Impl, deviation
from ragkv.model.cache import FusedCache

if TYPE_CHECKING:
    from ragkv.fusion.scene import Scene
    from ragkv.methods.base import Method
    from ragkv.model.decoder import Decoder


@dataclass(frozen=True, eq=False)
class Check:
    """What a method sees at a layer where it narrows the set: fresh and stored KV of the reusable tokens being computed.

    Attributes:
        layer: the decoder layer about to run.
        layers: L.
        layout: the whole prompt.
        positions: ``[R]`` positions of the reusable tokens being computed, ascending.
        fresh_keys: ``[H, R, D]``, rotated to their positions in the prompt; like ``stored_keys``.
        fresh_values: ``[H, R, D]``; like ``stored_values``.
        stored_keys: what the cache holds for the same tokens.
        stored_values: what the cache holds for the same tokens.
        impl: which implementation of ``ragkv.kernels`` runs.
    """

    layer: int
    layers: int
    layout: Layout
    positions: Tensor
    fresh_keys: Tensor
    fresh_values: Tensor
    stored_keys: Tensor
    stored_values: Tensor
    impl: Impl = "auto"

    def key_deviation(self) -> Tensor:
        """``[R]`` squared distance of fresh and stored keys, over heads and dimensions."""
        return deviation(self.fresh_keys, self.stored_keys, impl=self.impl)

    def value_deviation(self) -> Tensor:
        """``[R]`` squared distance of fresh and stored values, over heads and dimensions."""
        return deviation(self.fresh_values, self.stored_values, impl=self.impl)


@dataclass(frozen=True, eq=False)
class Work:
    """What a method wants for one prompt, checked.

    Attributes:
        method: the method.
        rows: ``[S]`` positions to compute from layer 0 on, ascending; the suffix is always among them.
        checks: layers at which the method is asked again, ascending.
        uses_stored: whether any stored KV is looked at.
        context: positions of the chunk tokens that chunk tokens being computed may see besides the prefix and their own chunk;
            ``None``: all that stands in front of them.
    """

    method: Method
    rows: Tensor
    checks: tuple[int, ...]
    uses_stored: bool
    context: Tensor | None = None


def plan(method: Method, layout: Layout, layers: int, scene: Scene | None = None) -> Work:
    """Ask a method for its first choice.

    Args:
        method: to be asked.
        layout: the prompt.
        layers: L.
        scene: for a method that looks at the prompt first.

    Raises:
        MethodError: it chose positions outside ``layout.reusable``, or layers that do not exist.
    """
    chosen = method.start(layout) if scene is None else method.survey(scene)
    active = _subset(chosen, layout.reusable, method)
    context = None if scene is None else method.context(scene)
    checks = tuple(sorted(set(method.checks(layers)))) if len(active) else ()
    if checks and not 0 <= checks[0] <= checks[-1] < layers:
        raise MethodError(f"{method!r} asked to check layers {checks} of a model with {layers}")
    if context is not None:
        context = _subset(context, layout.reusable, method)
    everything = len(active) == len(layout.reusable) and context is None
    if everything and len(active):
        # With the prefix computed too, though it is exact already, the model runs its ordinary causal path without a mask.
        return Work(method, torch.arange(layout.tokens, device=layout.ids.device), checks, bool(checks))
    return Work(method, torch.cat([active, layout.suffix]), checks, not everything, context)


def fuse(
    decoder: Decoder, cache: FusedCache, layout: Layout, work: Work, piece_tokens: int, place: Callable[[int], None]
) -> tuple[Tensor, Trace]:
    """Compute what a method asks for over the stored rest, and the suffix in any case.

    Args:
        decoder: the model.
        cache: with room for the N tokens; its content is written here.
        layout: the prompt.
        work: from :func:`plan`.
        piece_tokens: tokens that one forward computes at most, but where the set narrows with depth.
        place: writes one layer's prefix and stored chunks to their slots in the cache.

    Returns:
        Next-token logits ``[1, V]`` and what was done. The cache then holds the N tokens.
    """

    def narrow(layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        held = cache.layers[layer]
        stored = held.key_room[0].index_select(1, positions), held.value_room[0].index_select(1, positions)
        chosen = work.method.narrow(
            Check(layer, len(decoder.layers), layout, positions, keys, values, *stored, decoder.kernels)
        )
        return _subset(chosen, positions, work.method)

    run = Pass(decoder, cache, layout, work.rows, piece_tokens, place, work.checks, narrow, work.context)
    return run.logits(), run.trace


def recompute(decoder: Decoder, cache: FusedCache, ids: Tensor, rows: Tensor, piece_tokens: int = 512) -> Tensor:
    """Run the tokens at ``rows [S]`` (ascending, the last one the prompt's last) over a cache that holds all of ``ids [N]``.

    Returns:
        Next-token logits ``[1, V]``.
    """
    layout = Layout(ids, (), 0, len(ids))
    return Pass(decoder, cache, layout, rows, piece_tokens).scattered()


def _subset(chosen: Tensor, allowed: Tensor, method: Method) -> Tensor:
    chosen = torch.unique(chosen.to(allowed.device, torch.long))
    if not torch.isin(chosen, allowed).all():
        raise MethodError(
            f"{method!r} chose positions that are not open to it: it must choose among the {len(allowed)} reusable tokens being "
            "computed, and the set may only shrink with depth"
        )
    return chosen
