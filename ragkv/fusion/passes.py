"""One pass of the model over some tokens of a prompt whose other keys and values lie ready.

Fresh keys and values go to their slots of the cache, and attention is shown the whole prompt. N tokens of the prompt, S tokens
being computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ragkv.errors import MethodError
from ragkv.fusion.course import Course
from ragkv.fusion.layout import Layout
from ragkv.fusion.plan import Plan
from ragkv.fusion.timing import Timer
from ragkv.model.cache import FusedCache
from ragkv.model.masks import LayerMasks
from ragkv.model.rows import Rows

if TYPE_CHECKING:
    from ragkv.model.attending import Masses
    from ragkv.model.decoder import Decoder

#: Runs rows of a prompt; returns the next-token logits ``[W, V]`` of the last ones, as many as are wanted.
Forward = Callable[[Rows], Tensor]


# Rows at the end of a prompt that run in fixed shapes where there are any.
_FEW = 256


class Pass:
    """One pass over the rows of a plan.

    Args:
        decoder: the model.
        cache: with room for the N tokens; written. It holds the stored keys and values that the pass does not compute.
        layout: the prompt.
        work: what is computed.
        piece_tokens: rows that one forward computes at most, which bounds the activations; by causality earlier rows need
            nothing of later ones, but where positions do not rise with the slots.
        timer: counts the stage ``select``.
        forward: runs rows of the prompt; by default the model, for one turn.
        masses: takes what the rows attend to.
        course: parts of the rows, in their place: it may find that more have to be computed.

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
        work: Plan,
        piece_tokens: int,
        timer: Timer | None = None,
        forward: Forward | None = None,
        masses: Masses | None = None,
        course: Course | None = None,
    ):
        self.course: Course | None = course
        self.masses: Masses | None = masses
        self.forward: Forward = decoder.forward if forward is None else forward
        self.decoder: Decoder = decoder
        self.cache: FusedCache = cache
        self.layout: Layout = layout
        self.work: Plan = work
        self.piece_tokens: int = piece_tokens
        self.timer: Timer = Timer() if timer is None else timer
        self.rows: Tensor = work.rows
        self._known = work.trailing
        fresh = len(self._open(work.rows)) if work.fresh is None else work.fresh
        self.context: Tensor | None = work.context if fresh else None
        if self._limited and decoder.kernels != "auto":
            raise MethodError(
                f"kernels={decoder.kernels!r} was asked for, and selective attention cannot hide keys from recomputed tokens, nor "
                "follow chunks that stand apart or share positions: use kernels='auto', or a prompt and a method that do neither"
            )
        self.piece: Tensor = work.rows  # those of the forward at hand
        self.last: bool = False  # whether it is the last one
        self.fresh: list[int] = [fresh] * len(decoder.layers)
        self.attention: str = ""
        self.ran: str = "eager"

    @property
    def budget(self) -> float:
        """The budget really charged: fresh reusable tokens over layers x reusable tokens."""
        reusable = self.layout.chunk_tokens
        return sum(self.fresh) / (len(self.fresh) * reusable) if reusable else 0.0

    def logits(self) -> Tensor:
        """Run in the cheapest way that is exact for these rows; returns next-token logits ``[1, V]``."""
        logits = self._computed()
        self.cache.set_length(self.layout.tokens)
        return logits

    def _computed(self) -> Tensor:
        plain = not self._limited and self.course is None
        return self._behind() if plain and self._trailing else self.scattered()

    @property
    def _trailing(self) -> bool:
        """Whether the rows are the prompt's last ones: the suffix, or all chunks too; else a device is asked where nobody knows."""
        layout = self.layout
        if len(self.rows) in (layout.suffix_tokens, layout.tokens - layout.chunks_start):
            return True
        if self._known is not None:
            return self._known
        return bool(self.rows[0] == layout.tokens - len(self.rows))

    def _behind(self) -> Tensor:
        """The last rows of the prompt: an ordinary forward behind a filled cache, by whatever attention the model has."""
        first = self.layout.tokens - len(self.rows)
        if self._few:
            self._clear()
        for piece in self._pieces():
            out = self._on(piece, first)
            first += len(piece)
        return out

    def _on(self, piece: Tensor, first: int) -> Tensor:
        """Rows that follow each other, all in front of them in the cache; what is behind them there is overwritten or unseen."""
        self.cache.set_length(first)
        return self._run(piece, first=first if self._few else None)

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
    def _few(self) -> bool:
        """Whether they may run in fixed shapes, which look at all that the cache has memory for."""
        return len(self.rows) <= _FEW

    @property
    def _limited(self) -> bool:
        return self.context is not None or not self.layout.even

    def _clear(self) -> None:
        """Let no piece be shown what nobody wrote: the slots of later pieces and parts."""
        unused = [self.rows] if len(self.rows) > self.piece_tokens else []
        if self.course is not None:
            layout = self.layout
            unused.append(torch.arange(layout.chunks_start, layout.tokens, device=self.rows.device))
        if unused:
            self.cache.clear(torch.cat(unused))

    def _masks(self, rows: Tensor) -> LayerMasks:
        at = self.layout.positions
        open_keys = None if self.context is None else self._open_keys(rows)
        return self.decoder.masks(at[rows], len(at), None if self.layout.even else at, open_keys)

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
        return self.cache.scatter(layer, keys, values, self.piece, self.layout.tokens, self.decoder.kernels)


def recompute(decoder: Decoder, cache: FusedCache, ids: Tensor, rows: Tensor, piece_tokens: int = 512) -> Tensor:
    """Run the tokens at ``rows [S]`` (ascending, the last one the prompt's last) over a cache that holds all of ``ids [N]``.

    Returns:
        Next-token logits ``[1, V]``.
    """
    return Pass(decoder, cache, Layout(ids, (), 0, len(ids)), Plan(rows), piece_tokens).scattered()
