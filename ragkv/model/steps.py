"""Forwards that several threads ask for at the same time run as one.

There is no thread of the model's own: one of those who ask takes the model and runs what waits, the others' rows with its own (flat
combining, SPAA'10). So prompts join and leave between any two steps (Orca, OSDI'22), and pieces of a prompt that is being computed
take the others' tokens along (Sarathi-Serve, OSDI'24). Who is alone waits for nobody.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import TIMEOUT_MAX, Condition, get_ident
from time import perf_counter

from torch import Tensor

from ragkv.errors import ModelChangedError
from ragkv.forks import anew_in_forks
from ragkv.model.cache import FusedCache
from ragkv.model.decoder import Decoder
from ragkv.model.graphs import Graphs
from ragkv.model.packing import packs, run_packed
from ragkv.model.rows import Rows
from ragkv.model.turns import look

# How long the next step waits for those who had a token in the last ones, as a share of what a step takes.
_PATIENCE = 0.25
# Rows of prompts in a step, besides those of answers: more cost what they cost alone, and everybody waits for them.
_STEP_TOKENS = 512
_CHANGED = "the model's weights, adapter or attention have changed while it was in use: ask again"


@dataclass(eq=False)
class Seat:
    """Somebody who decodes an answer, token by token.

    Attributes:
        served_s: when the last step was done, as ``perf_counter()`` says it; infinite where its row is sure to come.
        slow: it did not come back in time last time, or is not here yet: nobody waits for it.
        asking: its next row waits, or runs.
    """

    served_s: float
    slow: bool = False
    asking: bool = False


@dataclass(eq=False)
class _Asked:
    """Rows that wait for a forward."""

    rows: Rows
    fingerprint: str
    seat: Seat | None
    alone: bool = False
    done: bool = False
    logits: Tensor | None = None
    error: Exception | None = None


class Meeting:
    """Threads whose rows are to run together: each waits until the others have come too, and the first step for the rows of all.

    Args:
        count: how many.
    """

    def __init__(self, count: int):
        self._count, self._came, self._changed = count, list[tuple[Seat, bool]](), Condition()
        self._over, self._served = False, set[int]()

    @contextmanager
    def seat(self, steps: Steps, last: bool = True) -> Iterator[Seat]:
        """A block in which this thread's rows run with those of the others, once they are here. It must ask for a forward before it
        waits for anything else that needs the model.

        Args:
            steps: of the model.
            last: it will not take a seat again, and the others need not wait for it when they do.
        """
        with steps.seat() as seat:
            with self._changed:
                if not self._over and get_ident() not in self._served:
                    seat.slow = True
                    self._came.append((seat, last))
                    if last:
                        self._served.add(get_ident())
                    self._begin()
                    self._changed.wait_for(lambda: not seat.slow)
            yield seat

    def leave(self) -> None:
        """This thread is done, or has failed: nobody waits for it."""
        with self._changed:
            self._count -= get_ident() not in self._served
            self._begin()

    def end(self) -> None:
        """Nobody waits any more: some will never come."""
        with self._changed:
            self._count, self._over = 0, True
            self._begin()

    def _begin(self) -> None:
        """Let all go on together, once they are here."""
        if len(self._came) < self._count:
            return
        for seat, last in self._came:
            seat.slow, seat.served_s = False, math.inf
            self._count -= last
        self._came.clear()
        self._changed.notify_all()


class Steps:
    """The forwards of one model.

    Args:
        decoder: the model.
        turn: gives it to one thread, and says its fingerprint.
        graphs: run one prompt's rows in fixed shapes, where there are any.

    Attributes:
        decoder, turn, graphs: as given.
        sizes: how many forwards so far served so many prompts at once.
    """

    def __init__(self, decoder: Decoder, turn: Callable[[], AbstractContextManager[str]], graphs: Graphs | None = None):
        self.sizes: Counter[int] = Counter()
        self.graphs: Graphs | None = graphs
        self.turn: Callable[[], AbstractContextManager[str]] = turn
        self.decoder: Decoder = decoder
        self._step_s = 0.0
        self._packs, self._tried = False, 0
        self.anew()
        anew_in_forks(self)

    def anew(self) -> None:
        """In a fork: nobody waits yet."""
        self._changed = Condition()
        self._waiting, self._seats = list[_Asked](), set[Seat]()
        self._leader: _Asked | None = None

    def run(self, rows: Rows, fingerprint: str, seat: Seat | None = None) -> Tensor:
        """Run rows, with whatever else waits.

        Args:
            rows: of one prompt. Nobody else may use its cache meanwhile.
            fingerprint: of the model that computed what the cache holds.
            seat: of the answer that they belong to.

        Returns:
            Next-token logits ``[W, V]`` of the last rows, as many as are wanted.

        Raises:
            ModelChangedError: the model is not the one that computed what the cache holds.
        """
        look()
        asked = _Asked(rows, fingerprint, seat, alone=self.decoder.turns.mine)
        with self._changed:
            if seat is not None:
                seat.slow, seat.asking = perf_counter() > seat.served_s + self._patience, True
            self._waiting.append(asked)
            self._changed.notify_all()
        try:
            while self._to_lead(asked):
                try:
                    with self.turn() as found:
                        self._lead(asked, found)
                finally:
                    self._give_over(asked)
        except BaseException:
            self._withdraw(asked)
            raise
        if asked.error is not None:
            try:
                raise asked.error
            finally:
                asked.error = None  # it holds this frame, and so the cache
        assert asked.logits is not None
        return asked.logits

    def forward(self, rows: Rows) -> Tensor:
        """Run rows of one prompt, and nobody else's, where this thread has the model."""
        return self.decoder.forward(rows) if self.graphs is None else self.graphs.forward(rows)

    @contextmanager
    def driving(self, cache: FusedCache) -> Iterator[None]:
        """A block that runs rows over a cache, behind which the cache has memory of its own again."""
        try:
            yield
        finally:
            self.leave(cache)

    def leave(self, cache: FusedCache) -> None:
        """Give a cache memory of its own again, as much as it needs, wherever fixed steps had it."""
        if self.graphs is not None:
            self.graphs.leave(cache)

    @contextmanager
    def turn_of(self, fingerprint: str) -> Iterator[None]:
        """The model for this thread alone, as it was when it had this fingerprint.

        Raises:
            ModelChangedError: it has another one now.
        """
        with self.turn() as found:
            if found != fingerprint:
                raise ModelChangedError(_CHANGED)
            yield

    @contextmanager
    def seat(self) -> Iterator[Seat]:
        """A block in which an answer is decoded: others wait a moment for its next row, so that they go on together."""
        seat = Seat(perf_counter())
        with self._changed:
            self._seats.add(seat)
        try:
            yield seat
        finally:
            with self._changed:
                self._seats.discard(seat)
                self._changed.notify_all()

    def _to_lead(self, asked: _Asked) -> bool:
        """Wait until the rows are run, or there is nobody who will: then whoever asked leads."""
        with self._changed:
            while not (asked.done or asked.alone or self._leader is None):
                self._changed.wait()
            if not asked.done and not asked.alone:
                self._leader = asked
            return not asked.done

    def _give_over(self, asked: _Asked) -> None:
        with self._changed:
            if self._leader is asked:
                self._leader = None
                self._changed.notify_all()

    def _lead(self, asked: _Asked, found: str) -> None:
        """Run one forward; ``asked`` is among those that wait."""
        with self._changed:
            company = len(self._waiting) > 1 or bool(self._others(asked.seat))
        together = company and not asked.alone and self.packs
        with self._changed:
            if together:
                self._gather()
            batch = self._fitting() if together else [asked]
            self._waiting = [other for other in self._waiting if other not in batch]
        lengths = [[layer.length for layer in one.rows.cache.layers] for one in batch]
        begin = perf_counter()
        try:
            self._forward(batch, found)
        except BaseException as error:
            for one, before in zip(batch, lengths, strict=True):
                one.alone = True  # whose fault it is shows when each runs by itself
                for layer, length in zip(one.rows.cache.layers, before, strict=True):
                    layer.length = length
            if not isinstance(error, Exception):
                raise
            if len(batch) == 1:
                batch[0].error, batch[0].done = error, True
        finally:
            self._over(batch, perf_counter() - begin)

    def _forward(self, batch: list[_Asked], found: str) -> None:
        for one in batch:
            if one.fingerprint != found:
                one.error = ModelChangedError(_CHANGED)
        good = [one for one in batch if one.error is None]
        if len(good) == 1:
            good[0].logits = self.forward(good[0].rows)
        elif good:
            logits = run_packed(self.decoder, [one.rows for one in good])
            for one, its in zip(good, logits, strict=True):
                one.logits = its
        for one in batch:
            one.done = True

    def _over(self, batch: list[_Asked], seconds: float) -> None:
        """Tell those whose rows were run; what was not goes back to its place."""
        served = [one for one in batch if one.done]
        with self._changed:
            self._waiting = [*(one for one in batch if not one.done), *self._waiting]
            self.sizes.update([len(served)] if served else [])
            self._step_s, now = seconds, perf_counter()
            for one in served:
                if one.seat is not None:
                    one.seat.served_s, one.seat.asking = now, False
            self._changed.notify_all()

    def _gather(self) -> None:
        """Wait a moment for those who had a token in the last steps and will soon ask for the next one."""
        while (left := self._expected() - perf_counter()) > 0:
            self._changed.wait(min(left, TIMEOUT_MAX))

    def _expected(self) -> float:
        """Until when the next step may wait for somebody."""
        thinking = [seat.served_s for seat in self._others(None) if not seat.slow and not seat.asking]
        return max(thinking) + self._patience if thinking else 0.0

    def _others(self, mine: Seat | None) -> list[Seat]:
        # An answer that is garbage leaves its seat anywhere.
        return [seat for seat in list(self._seats) if seat is not mine]

    def _fitting(self) -> list[_Asked]:
        """Of what waits: each answer's next row, and as many rows of prompts as a step may have; one prompt's in any case."""
        batch, tokens = list[_Asked](), 0
        for one in self._waiting:
            many = len(one.rows) if len(one.rows) > 1 else 0
            if one.alone or (many and tokens and tokens + many > _STEP_TOKENS):
                continue
            batch.append(one)
            tokens += many
        return batch

    def _withdraw(self, asked: _Asked) -> None:
        """Ask no more; where somebody runs the rows just now, that is waited for, for they are written to a cache."""
        with self._changed:
            while not asked.done:
                if asked in self._waiting:
                    self._waiting.remove(asked)
                    break
                self._changed.wait()

    @property
    def packs(self) -> bool:
        """Whether the model takes rows of several prompts; tried when it is first asked for, and when the model was changed."""
        if self._tried != self.decoder.probes:
            self._packs, self._tried = packs(self.decoder), self.decoder.probes
        return self._packs

    @property
    def _patience(self) -> float:
        return _PATIENCE * self._step_s
