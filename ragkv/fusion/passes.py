"""One pass of the model over some tokens of a prompt whose other keys and values lie ready.

Fresh keys and values go to their slots of the cache, and attention is shown the whole prompt. A method may narrow the set at some
depth, in a pre-hook of the decoder layer; the set never grows again. L layers, H kv heads, N tokens of the prompt, S tokens being
computed, R reusable ones among them, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ragkv.errors import MethodError
from ragkv.fusion.course import Course
from ragkv.fusion.layout import Layout
from ragkv.fusion.timing import Timer
from ragkv.model.cache import FusedCache, Writer
from ragkv.model.masks import UNUSED, LayerMasks, for_model
from ragkv.model.rows import Rows

if TYPE_CHECKING:
    from ragkv.model.attending import Masses
    from ragkv.model.decoder import Decoder

#: Asked before a layer, with the R reusable tokens being computed and their fresh keys and values ``[H, R, D]``; returns those of
#: them to go on with.
Narrow = Callable[[int, Tensor, Tensor, Tensor], Tensor]

#: Runs rows of a prompt; returns the next-token logits ``[W, V]`` of the last ones, as many as are wanted.
Forward = Callable[[Rows], Tensor]


# Rows at the end of a prompt that run in fixed shapes where there are any; for more the model's own attention is as good.
_FEW = 256


class _Reached(Exception):
    """Ends a forward once the keys and values of one layer are known."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys, values


class Pass:
    """One pass over ``rows``.

    Args:
        decoder: the model.
        cache: with room for the N tokens; written. It holds the stored keys and values that the pass does not compute.
        layout: the prompt.
        rows: ``[S]`` slots of the tokens to compute, ascending, the prompt's last one among them.
        piece_tokens: rows that one forward computes at most, which bounds the activations; by causality earlier rows need
            nothing of later ones, but where positions do not rise with the slots.
        checks: layers before which ``narrow`` is asked, ascending.
        narrow: see :data:`Narrow`.
        context: the chunk tokens that chunk tokens being computed may see besides the prefix and their own chunk; all that stand
            in front of them if not given.
        slots: of the cache that attention is shown, those behind the prompt's N hidden; N if not given.
        timer: counts the stage ``select``.
        forward: runs rows of the prompt; by default the model, for one turn.
        masses: takes what the rows attend to.
        course: parts of the rows, in their place: it may find that more have to be computed.
        fresh: how many of the rows are reusable tokens, where that is known: to count them waits for the device.
        trailing: whether they are the prompt's last ones, where that is known, for the same reason. Narrowed ones seldom are.

    Attributes:
        rows: of the layer at hand; in the end those computed in the last layer.
        fresh: reusable tokens whose KV were computed, layer by layer.
        attention: the attention implementation that ran.
        ran: how the last forward ran, as of :class:`~ragkv.model.rows.Rows`.

    Raises:
        MethodError: what a row sees is no run of slots, and ``kernels`` were asked for by name.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: FusedCache,
        layout: Layout,
        rows: Tensor,
        piece_tokens: int = 512,
        *,
        checks: tuple[int, ...] = (),
        narrow: Narrow | None = None,
        context: Tensor | None = None,
        slots: int | None = None,
        timer: Timer | None = None,
        forward: Forward | None = None,
        masses: Masses | None = None,
        course: Course | None = None,
        fresh: int | None = None,
        trailing: bool | None = None,
    ):
        self.course: Course | None = course
        self.masses: Masses | None = masses
        self.forward: Forward = decoder.forward if forward is None else forward
        self.decoder: Decoder = decoder
        self.cache: FusedCache = cache
        self.layout: Layout = layout
        self.piece_tokens: int = piece_tokens
        self.narrow: Narrow | None = narrow
        self.timer: Timer = Timer() if timer is None else timer
        self.checks: tuple[int, ...] = checks
        self.rows: Tensor = rows
        self._known = trailing
        fresh = len(self._open(rows)) if fresh is None else fresh
        self.context: Tensor | None = context if fresh else None
        if self._limited and decoder.kernels != "auto":
            raise MethodError(
                f"kernels={decoder.kernels!r} was asked for, and selective attention cannot hide keys from recomputed tokens, nor "
                "follow chunks that stand apart or share positions: use kernels='auto', or a prompt and a method that do neither"
            )
        self.slots: int = layout.tokens if slots is None else slots
        self.piece: Tensor = rows  # those of the forward at hand
        self.last: bool = False  # whether it is the last one
        self.kept: Tensor | None = None  # rows as indices into those that the forward began with, once narrowed
        self.begun: int = len(rows)  # how many those were
        self.fresh: list[int] = [fresh] * len(decoder.layers)
        self.attention: str = ""
        self.ran: str = "eager"

    @property
    def budget(self) -> float:
        """The budget really charged: fresh reusable tokens over layers x reusable tokens."""
        reusable = self.layout.suffix_start - self.layout.chunks_start
        return sum(self.fresh) / (len(self.fresh) * reusable) if reusable else 0.0

    def logits(self) -> Tensor:
        """Run in the cheapest way that is exact for these rows; returns next-token logits ``[1, V]``."""
        plain = self.layout.even and self.context is None and self.slots == self.layout.tokens
        whole = plain and len(self.rows) == self.layout.tokens - self.layout.held
        if self.checks and whole and self.masses is None:
            self._first_check()
        if self.checks:
            logits = self._narrowing()
        elif plain and self.course is None and self._trailing:
            logits = self._behind()
        else:
            logits = self.scattered()
        self.cache.set_length(self.layout.tokens)
        return logits

    @property
    def _trailing(self) -> bool:
        """Whether the rows are the prompt's last ones: the suffix, or all chunks too; else a device is asked where nobody knows."""
        layout = self.layout
        if len(self.rows) in (layout.tokens - layout.suffix_start, layout.tokens - layout.chunks_start):
            return True
        if self._known is not None:
            return self._known
        return bool(self.rows[0] == layout.tokens - len(self.rows))

    def _behind(self) -> Tensor:
        """The last rows of the prompt: an ordinary forward behind a filled cache, by whatever attention the model has."""
        first = self.layout.tokens - len(self.rows)
        for piece in self._pieces():
            out = self._on(piece, first)
            first += len(piece)
        return out

    def _on(self, piece: Tensor, first: int) -> Tensor:
        """Rows that follow each other, all in front of them in the cache; what is behind them there is overwritten or unseen."""
        self.cache.set_length(first)
        return self._run(piece, first=first if len(self.rows) <= _FEW else None)

    def scattered(self) -> Tensor:
        """Scattered rows: fresh KV go to their slots, and attention sees the whole prompt through masks."""
        self._clear()
        for piece in self._pieces():
            # All that stands in front of a part of a course is there, and without masks it takes less time.
            if self.course is not None and not self._limited and piece[-1] - piece[0] == len(piece) - 1:
                out = self._on(piece, int(piece[0]))
            else:
                with self.cache.writing(self._write):
                    out = self._run(piece, self._masks(piece))
        if self.course is not None:
            self.rows = self.course.rows
            self.fresh = [len(self._open(self.rows))] * len(self.fresh)
        return out

    def _narrowing(self) -> Tensor:
        """Scattered rows that become fewer with depth."""
        self._clear()
        self.piece, self.begun, masses = self.rows, len(self.rows), self._seen_by(self.rows)
        layers = list(enumerate(self.decoder.layers))[self.checks[0] :]
        hooks = [layer.register_forward_pre_hook(self._hook(number), with_kwargs=True) for number, layer in layers]
        if self.decoder.keeps_last:
            hooks.append(layers[-1][1].register_forward_hook(self._widened))
        try:
            with self._attention(scattered=True, masses=masses), self.cache.writing(self._write):
                self.masks: LayerMasks = self._masks(self.rows)
                at, mask = self.layout.positions[self.rows], for_model(self.masks, self.decoder.config)
                return self.decoder.step(self.layout.ids[self.rows], at, self.cache, mask)
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
        """Where every token that is not held is computed up to the first check, do so piece by piece and stop there.

        The layers above the check are run again for the few tokens that were kept: that costs less than to hold the hidden
        states of all.
        """
        layer, keys, values, first = self.checks[0], [], [], self.layout.held
        with self._attention(scattered=False), self.cache.writing(self._until(layer)):
            for piece in self._pieces():
                self.cache.set_length(first)
                first += len(piece)
                try:
                    self.decoder.run(self.layout.ids[piece], piece, self.cache)
                except _Reached as reached:
                    keys.append(reached.keys)
                    values.append(reached.values)
        self._shrink(layer, self._choose(layer, torch.cat(keys, 2), torch.cat(values, 2)))
        self.checks = self.checks[1:]

    def _run(self, piece: Tensor, masks: LayerMasks | None = None, first: int | None = None) -> Tensor:
        """Logits behind the last piece; behind the others nobody asks for any."""
        at = self.layout.positions[piece]
        rows = Rows(
            *(self.layout.ids[piece], at, self.cache, masks, int(self.last), self._limited, self._seen_by(piece)),
            first=first,
        )
        logits = self.forward(rows)
        self.attention, self.ran = rows.attention, rows.ran
        return logits

    def _seen_by(self, rows: Tensor) -> Masses | None:
        """Takes what these rows attend to."""
        if self.masses is not None:
            self.masses.slots = rows
        return self.masses

    def _pieces(self) -> Iterator[Tensor]:
        left = len(self.rows)
        for part in [self.rows] if self.course is None else self.course:
            for piece in part.split(self.piece_tokens if self.layout.ascending else len(part)):
                left -= len(piece)
                self.last = not left if self.course is None else bool(piece[-1] == self.rows[-1])
                self.piece = piece
                yield piece

    @contextmanager
    def _attention(self, scattered: bool, masses: Masses | None = None) -> Iterator[None]:
        switched = self.decoder.fusion_attention(scattered=scattered, limited=self._limited, masses=masses)
        with switched as self.attention:
            yield

    @property
    def _limited(self) -> bool:
        return self.context is not None or not self.layout.even

    def _clear(self) -> None:
        """Let no piece be shown what nobody wrote: the slots of later pieces and parts, and those behind the prompt."""
        first = self.layout.tokens if self.course is None else self.layout.chunks_start
        unused = torch.arange(first, self.slots, device=self.rows.device)
        if len(self.rows) > self.piece_tokens and not self.checks:
            unused = torch.cat([self.rows, unused])
        if len(unused):
            self.cache.clear(unused)

    def _masks(self, rows: Tensor) -> LayerMasks:
        at, keys, hidden = self.layout.positions, None, self.slots - self.layout.tokens
        if not self.layout.even:
            keys = nn.functional.pad(at, (0, hidden), value=UNUSED)
        open_keys = None if self.context is None else nn.functional.pad(self._open_keys(rows), (0, hidden))
        return self.decoder.masks(at[rows], self.slots, keys, open_keys)

    def _open_keys(self, rows: Tensor) -> Tensor:
        """``[S, N]`` the keys that each row may see where the context of chunk tokens is limited."""
        assert self.context is not None
        owners = self.layout.owners
        shared = owners < 0
        shared[self.context] = True
        return shared | (owners[rows][:, None] == owners) | (rows >= self.layout.suffix_start)[:, None]

    def _open(self, rows: Tensor) -> Tensor:
        """The reusable ones among rows: a method may drop them."""
        return rows[(rows >= self.layout.chunks_start) & (rows < self.layout.suffix_start)]

    def _write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.scatter(layer, keys, values, self.piece, self.slots, self.decoder.kernels)

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
                hidden = hidden[:, keep.to(hidden.device)]
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
        assert self.narrow is not None
        with self.timer.stage("select"):
            stop = len(self.rows) - (self.layout.tokens - self.layout.suffix_start)
            inside = slice(stop - self.fresh[number], stop)
            chosen = self.narrow(number, self.rows[inside], keys[0][:, inside], values[0][:, inside])
            suffix = torch.arange(stop, len(self.rows), device=self.rows.device)
            return torch.cat([torch.searchsorted(self.rows, chosen), suffix])

    def _shrink(self, layer: int, keep: Tensor) -> None:
        """Go on with some of the present rows; at the check layer itself, all had their keys and values computed."""
        self.rows, self._known = self.rows[keep], False
        self.piece = self.rows
        self._seen_by(self.rows)
        behind = layer + 1
        fresh = len(keep) - (self.layout.tokens - self.layout.suffix_start)
        self.fresh[behind:] = [fresh] * (len(self.fresh) - behind)

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
