"""The heart: stored keys and values are placed, and the model's own forward recomputes the tokens that need it.

The model runs over some tokens of the prompt only. Its cache puts their fresh keys and values at their positions and shows
attention the whole prompt. A method may narrow the set at some depth, in a pre-hook of the decoder layer; the set never grows
again. L layers, H kv heads, N tokens of the prompt, S tokens being computed, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ragkv.cache import FusedCache
from ragkv.errors import MethodError
from ragkv.kernels import deviation
from ragkv.layout import Layout
from ragkv.masks import for_model

if TYPE_CHECKING:
    from ragkv.methods.base import Method
    from ragkv.model import Decoder


@dataclass(frozen=True, eq=False)
class Check:
    """What a method sees at a layer where it narrows the set: fresh and stored KV of the reusable tokens being computed.

    Attributes:
        layer: the decoder layer about to run.
        layout: the whole prompt.
        positions: ``[R]`` positions of the reusable tokens being computed, ascending.
        fresh_keys: ``[H, R, D]``, rotated to their positions in the prompt; like ``stored_keys``.
        fresh_values: ``[H, R, D]``; like ``stored_values``.
        stored_keys: what the cache holds for the same tokens.
        stored_values: what the cache holds for the same tokens.
    """

    layer: int
    layout: Layout
    positions: Tensor
    fresh_keys: Tensor
    fresh_values: Tensor
    stored_keys: Tensor
    stored_values: Tensor

    def key_deviation(self) -> Tensor:
        """``[R]`` squared distance of fresh and stored keys, over heads and dimensions."""
        return deviation(self.fresh_keys, self.stored_keys)

    def value_deviation(self) -> Tensor:
        """``[R]`` squared distance of fresh and stored values, over heads and dimensions."""
        return deviation(self.fresh_values, self.stored_values)


@dataclass(eq=False)
class Trace:
    """What one pass did.

    Attributes:
        rows: ``[S]`` positions computed in the last layer.
        fresh: reusable tokens whose KV were computed, layer by layer.
        attention: the attention implementation that ran.
        seconds: time by stage: ``place`` (load, decode and rotate stored KV), ``select`` (look and choose), ``compute``.
    """

    rows: Tensor
    fresh: list[int] = field(default_factory=list)
    attention: str = ""
    seconds: dict[str, float] = field(default_factory=lambda: {"place": 0.0, "select": 0.0, "compute": 0.0})

    def budget(self, layout: Layout) -> float:
        """The budget really charged: fresh reusable tokens over layers x reusable tokens."""
        reusable = layout.suffix_start - layout.chunks_start
        return sum(self.fresh) / (len(self.fresh) * reusable) if reusable else 0.0


@dataclass(frozen=True, eq=False)
class Work:
    """What a method wants for one prompt, checked.

    Attributes:
        method: the method.
        rows: ``[S]`` positions to compute from layer 0 on, ascending; the suffix is always among them.
        checks: layers at which the method is asked again, ascending.
        uses_stored: whether any stored KV is looked at.
    """

    method: Method
    rows: Tensor
    checks: tuple[int, ...]
    uses_stored: bool


def plan(method: Method, layout: Layout, layers: int) -> Work:
    """Ask a method for its first choice.

    Raises:
        MethodError: it chose positions outside ``layout.reusable``, or layers that do not exist.
    """
    active = _subset(method.start(layout), layout.reusable, method)
    checks = tuple(sorted(set(method.checks(layers)))) if len(active) else ()
    if checks and not 0 <= checks[0] <= checks[-1] < layers:
        raise MethodError(f"{method!r} asked to check layers {checks} of a model with {layers}")
    everything = len(active) == len(layout.reusable)
    if everything and len(active):
        # With the prefix computed too, though it is exact already, the model runs its ordinary causal path without a mask.
        return Work(method, torch.arange(layout.tokens, device=layout.ids.device), checks, bool(checks))
    return Work(method, torch.cat([active, layout.suffix]), checks, not everything)


def fuse(
    decoder: Decoder, cache: FusedCache, layout: Layout, work: Work, place: Callable[[int], None]
) -> tuple[Tensor, Trace]:
    """Compute what a method asks for over the stored rest, and the suffix in any case.

    Args:
        decoder: the model.
        cache: with room for the N tokens; its content is written here.
        layout: the prompt.
        work: from :func:`plan`.
        place: writes one layer's prefix and stored chunks to their slots in the cache.

    Returns:
        Next-token logits ``[1, V]`` and what was done. The cache then holds the N tokens.
    """
    run = _Pass(decoder, cache, layout, work.rows, work.method, work.checks, place)
    return run.logits(), run.trace


def recompute(decoder: Decoder, cache: FusedCache, ids: Tensor, rows: Tensor) -> Tensor:
    """Run the tokens at ``rows [S]`` (ascending, the last one the prompt's last) over a cache that holds all of ``ids [N]``.

    Returns:
        Next-token logits ``[1, V]``.
    """
    layout = Layout(ids, (), 0, len(ids))
    return _Pass(decoder, cache, layout, rows, None, (), lambda layer: None).scattered()


def _subset(chosen: Tensor, allowed: Tensor, method: Method) -> Tensor:
    chosen = torch.unique(chosen.to(allowed.device, torch.long))
    if not torch.isin(chosen, allowed).all():
        raise MethodError(
            f"{method!r} chose positions that are not open to it: it must choose among the {len(allowed)} reusable tokens being "
            "computed, and the set may only shrink with depth"
        )
    return chosen


class _Peeked(Exception):
    """Ends a layer's forward once its keys and values are known."""


class _Pass:
    """One forward pass over ``rows``, which may shrink with depth."""

    def __init__(
        self,
        decoder: Decoder,
        cache: FusedCache,
        layout: Layout,
        rows: Tensor,
        method: Method | None,
        checks: tuple[int, ...],
        place: Callable[[int], None],
    ):
        self.decoder, self.cache, self.layout, self.method = decoder, cache, layout, method
        self.checks = checks
        self.rows, self.first_rows = rows, rows  # now, and when the pass began
        self.kept: Tensor | None = None  # rows as indices into first_rows, once narrowed
        self.masks = decoder.masks(rows, layout.tokens)
        self.place, self.placed = place, -1  # stored KV are placed up to this layer
        self.seen: tuple[Tensor, Tensor] | None = None
        self.trace = Trace(rows)

    def logits(self) -> Tensor:
        """Run, in the cheapest way that is exact for these rows."""
        begin = perf_counter()
        try:
            if not self.checks and self.rows[0] == self.layout.tokens - len(self.rows):
                logits = self._contiguous()
            else:
                logits = self.scattered()
        finally:
            self.cache.prepare = self.cache.writer = None
        self.cache.set_length(self.layout.tokens)
        self.trace.rows = self.rows
        seconds = self.trace.seconds
        seconds["compute"] = perf_counter() - begin - seconds["place"] - seconds["select"]
        return logits

    def _contiguous(self) -> Tensor:
        """The last rows of the prompt: an ordinary forward behind a filled cache, by whatever attention the model has."""
        self.cache.set_length(self.layout.tokens - len(self.rows))
        self.cache.prepare = self._prepare
        self.trace.fresh = [self._reusable_rows()] * len(self.decoder.layers)
        with self.decoder.fusion_attention(scattered=False) as self.trace.attention:
            return self.decoder.step(self.layout.ids[self.rows], self.rows, self.cache)

    def scattered(self) -> Tensor:
        """Scattered rows: fresh KV go to their positions, and attention sees the whole prompt through masks."""
        self.cache.set_length(0)
        self.cache.prepare, self.cache.writer = self._prepare, self._write
        hooks = [
            layer.register_forward_pre_hook(self._hook(number), with_kwargs=True)
            for number, layer in enumerate(self.decoder.layers)
            if self.checks and number >= self.checks[0]
        ]
        try:
            with self.decoder.fusion_attention(scattered=True) as self.trace.attention:
                self.masks = self.decoder.masks(self.rows, self.layout.tokens)
                mask = None if self._everything() else for_model(self.masks, self.decoder.config)
                return self.decoder.step(self.layout.ids[self.rows], self.rows, self.cache, mask)
        finally:
            for hook in hooks:
                hook.remove()
            self.cache.prepare = self.cache.writer = None

    def _everything(self) -> bool:
        return len(self.rows) == self.layout.tokens

    def _reusable_rows(self) -> int:
        return int(((self.rows >= self.layout.chunks_start) & (self.rows < self.layout.suffix_start)).sum())

    def _prepare(self, layer: int) -> None:
        # Where every token is computed anyway, stored KV would only be overwritten; a check still wants to see them.
        if layer <= self.placed or (self._everything() and layer not in self.checks):
            return
        begin = perf_counter()
        self.place(layer)
        self.placed = layer
        self.trace.seconds["place"] += perf_counter() - begin

    def _write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put fresh ``[1, H, S, D]`` to their positions; return all ``[1, H, N, D]``."""
        if len(self.trace.fresh) == layer:
            self.trace.fresh.append(self._reusable_rows())
        held = self.cache.layers[layer]
        rows = self.rows.to(keys.device)
        held.key_room.index_copy_(2, rows, keys)
        held.value_room.index_copy_(2, rows, values)
        tokens = self.layout.tokens
        return held.key_room[:, :, :tokens], held.value_room[:, :, :tokens]

    def _hook(self, number: int) -> Callable[..., tuple[tuple, dict]]:
        def narrowed(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            hidden, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
            if number in self.checks:
                inner = tuple(self._take(value) for value in rest), self._take_all(number, kwargs)
                keep = self._choose(number, module, hidden, *inner)
                hidden = hidden[:, keep]
                self._shrink(keep)
            rest, kwargs = tuple(self._take(value) for value in rest), self._take_all(number, kwargs)
            if args:
                return (hidden, *rest), kwargs
            return (), {**kwargs, "hidden_states": hidden}

        return narrowed

    def _choose(self, number: int, module: nn.Module, hidden: Tensor, rest: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Ask the method which rows to keep; returns them as indices into the present rows."""
        begin, placing = perf_counter(), self.trace.seconds["place"]
        assert self.method is not None
        keys, values = self._peek(module, (hidden, *rest), {k: v for k, v in kwargs.items() if k != "hidden_states"})
        open_rows = (self.rows >= self.layout.chunks_start) & (self.rows < self.layout.suffix_start)
        at, held = self.rows[open_rows], self.cache.layers[number]
        self.trace.fresh.append(len(at))
        stored = held.key_room[0].index_select(1, at), held.value_room[0].index_select(1, at)
        check = Check(number, self.layout, at, keys[0][:, open_rows], values[0][:, open_rows], *stored)
        chosen = _subset(self.method.narrow(check), at, self.method)
        keep = torch.isin(self.rows, chosen) | (self.rows >= self.layout.suffix_start)
        self.trace.seconds["select"] += perf_counter() - begin - (self.trace.seconds["place"] - placing)
        return keep.nonzero()[:, 0]

    def _peek(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Run a layer only as far as its keys and values ``[1, H, S, D]``."""

        def capture(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            self.seen = (keys, values)
            raise _Peeked

        self.cache.writer = capture
        try:
            module.forward(*args, **kwargs)
        except _Peeked:
            pass
        finally:
            self.cache.writer = self._write
        assert self.seen is not None
        return self.seen

    def _shrink(self, keep: Tensor) -> None:
        self.rows = self.rows[keep]
        self.kept = keep if self.kept is None else self.kept[keep]
        self.masks = self.decoder.masks(self.rows, self.layout.tokens)

    def _take_all(self, number: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.kept is None:
            return kwargs
        taken = {
            name: self._take(value) for name, value in kwargs.items() if name not in ("attention_mask", "hidden_states")
        }
        return {**taken, "attention_mask": self.masks.layer(number)}

    def _take(self, value: Any) -> Any:
        """The present rows of whatever a layer is given for the rows that the pass began with: ``[B, S, ...]``."""
        if self.kept is None:
            return value
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == len(self.first_rows):
            return value[:, self.kept.to(value.device)]
        if isinstance(value, tuple):
            return tuple(self._take(item) for item in value)
        return value
