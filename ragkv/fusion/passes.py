"""One pass of the model over some tokens of a prompt whose other keys and values lie ready.

The cache puts fresh keys and values at their positions and shows attention the whole prompt. A method may narrow the set at some
depth, in a pre-hook of the decoder layer; the set never grows again. L layers, H kv heads, N tokens of the prompt, S tokens being
computed, R reusable ones among them, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ragkv.fusion.layout import Layout
from ragkv.kernels import scatter
from ragkv.model.cache import FusedCache, Writer
from ragkv.model.kernel_attention import SpanBuilder
from ragkv.model.masks import MaskBuilder, for_model

if TYPE_CHECKING:
    from ragkv.model.decoder import Decoder

#: Asked before a layer, with the R reusable tokens being computed and their fresh keys and values ``[H, R, D]``; returns the
#: positions among them to go on with.
Narrow = Callable[[int, Tensor, Tensor, Tensor], Tensor]


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


class _Reached(Exception):
    """Ends a forward once the keys and values of one layer are known."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys, values


class Pass:
    """One pass over ``rows``.

    Args:
        decoder: the model.
        cache: with room for the N tokens; written.
        layout: the prompt.
        rows: ``[S]`` positions to compute, ascending, the prompt's last one among them.
        piece_tokens: rows that one forward computes at most, which bounds the activations; by causality earlier rows need
            nothing of later ones.
        place: writes one layer's stored keys and values to their slots in the cache.
        checks: layers before which ``narrow`` is asked, ascending.
        narrow: see :data:`Narrow`.
        context: positions of the chunk tokens that chunk tokens being computed may see besides the prefix and their own chunk;
            all that stands in front of them if not given.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: FusedCache,
        layout: Layout,
        rows: Tensor,
        piece_tokens: int,
        place: Callable[[int], None] = lambda layer: None,
        checks: tuple[int, ...] = (),
        narrow: Narrow | None = None,
        context: Tensor | None = None,
    ):
        self.decoder, self.cache, self.layout, self.piece_tokens = decoder, cache, layout, piece_tokens
        self.checks, self.narrow = checks, narrow
        self.context = context if len(self._open(rows)) else None
        self.rows = rows  # to compute, from the layer at hand on
        self.piece = rows  # those of the forward at hand
        self.kept: Tensor | None = None  # rows as indices into those that the forward began with, once narrowed
        self.begun = len(rows)  # how many those were
        self.place, self.placed = place, -1  # stored KV are placed up to this layer
        self.trace = Trace(rows, [len(self._open(rows))] * len(decoder.layers))

    def logits(self) -> Tensor:
        """Run in the cheapest way that is exact for these rows; returns next-token logits ``[1, V]``."""
        begin = perf_counter()
        self.cache.prepare = self._prepare
        try:
            if self.checks and self._everything() and self.context is None:
                self._first_check()
            if self.checks:
                logits = self._narrowing()
            elif self.context is None and self.rows[0] == self.layout.tokens - len(self.rows):
                logits = self._behind()
            else:
                logits = self.scattered()
        finally:
            self.cache.prepare = None
        self.cache.set_length(self.layout.tokens)
        self.trace.rows = self.rows
        seconds = self.trace.seconds
        seconds["compute"] = perf_counter() - begin - seconds["place"] - seconds["select"]
        return logits

    def _behind(self) -> Tensor:
        """The last rows of the prompt: an ordinary forward behind a filled cache, by whatever attention the model has."""
        with self._attention(scattered=False):
            for piece in self._pieces():
                self.cache.set_length(int(piece[0]))
                out = self._forward(piece)
        return out

    def scattered(self) -> Tensor:
        """Scattered rows: fresh KV go to their positions, and attention sees the whole prompt through masks."""
        with self._attention(scattered=True), self._writing(self._write):
            for piece in self._pieces():
                out = self._forward(piece, for_model(self._masks(piece), self.decoder.config))
        return out

    def _narrowing(self) -> Tensor:
        """Scattered rows that become fewer with depth."""
        self.piece, self.begun = self.rows, len(self.rows)
        layers = list(enumerate(self.decoder.layers))[self.checks[0] :]
        hooks = [layer.register_forward_pre_hook(self._hook(number), with_kwargs=True) for number, layer in layers]
        if self.decoder.keeps_last:
            hooks.append(layers[-1][1].register_forward_hook(self._widened))
        try:
            with self._attention(scattered=True), self._writing(self._write):
                self.masks = self._masks(self.rows)
                return self._forward(self.rows, for_model(self.masks, self.decoder.config))
        finally:
            for hook in hooks:
                hook.remove()

    def _widened(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """As many rows as the forward began with, zeros where none are left: some models shape the end like the beginning."""
        if self.kept is None:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        wide = hidden.new_zeros(hidden.shape[0], self.begun, hidden.shape[2])
        wide[:, self.kept.to(hidden.device)] = hidden
        return (wide, *output[1:]) if isinstance(output, tuple) else wide

    def _first_check(self) -> None:
        """Where every token is computed up to the first check, do so piece by piece and stop there.

        The layers above the check are run again for the few tokens that were kept: that costs less than to hold the hidden
        states of all.
        """
        layer, keys, values = self.checks[0], [], []
        with self._attention(scattered=False), self._writing(self._until(layer)):
            for piece in self._pieces():
                self.cache.set_length(int(piece[0]))
                try:
                    self.decoder.run(self.layout.ids[piece], piece, self.cache)
                except _Reached as reached:
                    keys.append(reached.keys)
                    values.append(reached.values)
        keep = self._choose(layer, torch.cat(keys, 2), torch.cat(values, 2))
        self._shrink(layer, keep)
        self.checks = self.checks[1:]

    def _forward(self, rows: Tensor, mask=None) -> Tensor:
        """Logits behind the last piece; behind the others hidden states, for which nobody asks."""
        run = self.decoder.step if rows[-1] == self.rows[-1] else self.decoder.run
        return run(self.layout.ids[rows], rows, self.cache, mask)

    def _pieces(self) -> Iterator[Tensor]:
        for piece in self.rows.split(self.piece_tokens):
            self.piece = piece
            yield piece

    @contextmanager
    def _attention(self, scattered: bool) -> Iterator[None]:
        limited = self.context is not None
        with self.decoder.fusion_attention(scattered=scattered, limited=limited) as self.trace.attention:
            yield

    @contextmanager
    def _writing(self, writer: Writer) -> Iterator[None]:
        self.cache.set_length(0)
        self.cache.writer = writer
        try:
            yield
        finally:
            self.cache.writer = None

    def _masks(self, rows: Tensor) -> MaskBuilder | SpanBuilder:
        return self.decoder.masks(rows, self.layout.tokens, None if self.context is None else self._open_keys(rows))

    def _open_keys(self, rows: Tensor) -> Tensor:
        """``[S, N]`` the keys that each row may see where the context of chunk tokens is limited."""
        assert self.context is not None
        owners = self.layout.owners
        shared = owners < 0
        shared[self.context] = True
        return shared | (owners[rows][:, None] == owners) | (rows >= self.layout.suffix_start)[:, None]

    def _everything(self) -> bool:
        return len(self.rows) == self.layout.tokens

    def _open(self, rows: Tensor) -> Tensor:
        """The reusable ones among rows: a method may drop them."""
        return rows[(rows >= self.layout.chunks_start) & (rows < self.layout.suffix_start)]

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
        held, tokens = self.cache.layers[layer], self.layout.tokens
        rows, impl = self.piece.to(keys.device), self.decoder.kernels
        scatter(keys[0], values[0], rows, held.key_room[0], held.value_room[0], impl=impl)
        return held.key_room[:, :, :tokens], held.value_room[:, :, :tokens]

    def _until(self, last: int) -> Writer:
        """Appends up to a layer and ends the forward there."""

        def write(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            if layer == last:
                raise _Reached(keys, values)
            return self.cache.layers[layer].update(keys, values)

        return write

    def _hook(self, number: int) -> Callable[..., tuple[tuple, dict]]:
        def narrowed(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            hidden, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
            if number in self.checks:
                inner = tuple(self._take(value) for value in rest), self._take_all(number, kwargs)
                keep = self._choose(number, *self._peek(number, module, (hidden, *inner[0]), inner[1]))
                hidden = hidden[:, keep]
                self.kept = keep if self.kept is None else self.kept[keep]
                self._shrink(number, keep)
                self.masks = self._masks(self.rows)
            rest, kwargs = tuple(self._take(value) for value in rest), self._take_all(number, kwargs)
            if args:
                return (hidden, *rest), kwargs
            return (), {**kwargs, "hidden_states": hidden}

        return narrowed

    def _peek(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Run a layer only as far as its keys and values ``[1, H, S, D]``."""
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self.cache.writer = self._until(number)
        try:
            module.forward(*args, **kwargs)
        except _Reached as reached:
            return reached.keys, reached.values
        finally:
            self.cache.writer = self._write
        raise AssertionError(f"layer {number} ended without writing keys and values")

    def _choose(self, number: int, keys: Tensor, values: Tensor) -> Tensor:
        """Ask which rows to keep, given all rows' fresh ``[1, H, S, D]``; returns them as indices into the present rows."""
        begin, placing = perf_counter(), self.trace.seconds["place"]
        assert self.narrow is not None
        at = self._open(self.rows)
        inside = torch.isin(self.rows, at)
        chosen = self.narrow(number, at, keys[0][:, inside], values[0][:, inside])
        keep = torch.isin(self.rows, chosen) | (self.rows >= self.layout.suffix_start)
        self.trace.seconds["select"] += perf_counter() - begin - (self.trace.seconds["place"] - placing)
        return keep.nonzero()[:, 0]

    def _shrink(self, layer: int, keep: Tensor) -> None:
        """Go on with some of the present rows; at the check layer itself, all had their keys and values computed."""
        self.rows = self.piece = self.rows[keep]
        behind = layer + 1
        self.trace.fresh[behind:] = [len(self._open(self.rows))] * (len(self.trace.fresh) - behind)

    def _take_all(self, number: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.kept is None:
            return kwargs
        taken = {
            name: self._take(value) for name, value in kwargs.items() if name not in ("attention_mask", "hidden_states")
        }
        return {**taken, "attention_mask": self.masks.layer(number)}

    def _take(self, value: Any) -> Any:
        """The present rows of whatever a layer is given for the rows that the forward began with: ``[B, S, ...]``."""
        if self.kept is None:
            return value
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == self.begun:
            return value[:, self.kept.to(value.device)]
        if isinstance(value, tuple):
            return tuple(self._take(item) for item in value)
        return value
