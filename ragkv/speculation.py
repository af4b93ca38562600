"""Prompts that are begun while a reranker still orders their passages (RAGCache, arXiv:2404.12457, algorithm 2)."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import partial
from threading import Condition, Event
from weakref import ref

import torch

from ragkv.background import Background
from ragkv.engine import Engine
from ragkv.finding import Finder, Found
from ragkv.fusion.layout import Layout
from ragkv.library.documents import Documents
from ragkv.library.rates import to_fetch
from ragkv.library.watching import Tell, told_of_hits
from ragkv.methods import Method
from ragkv.model.turns import looking
from ragkv.report import FusedPrompt
from ragkv.request import Request, Room
from ragkv.retrieval import Hit
from ragkv.store import Moved

logger: logging.Logger = logging.getLogger(__name__)

# Of the questions before, the last ones counting most: where fewer lists stayed as they were found first, no prompt is begun.
_LEAST_STAYED, _LAST = 0.25, 0.25


class _GivenUpError(Exception):
    """Ends a pass."""


class Ahead:
    """Begins prompts ahead in a thread of its own, one at a time, and only while nobody else waits or is answered.

    Args:
        engine: makes them.
        finder: knows their passages.
    """

    def __init__(self, engine: Engine, finder: Finder):
        self.engine: Engine = engine
        self.finder: Finder = finder
        self.background: Background = Background("a prompt begun ahead", 1)
        self._share = 1.0  # of the lists that stayed
        self._latest: ref[Speculation] | None = None

    def may(self, one: Speculation) -> bool:
        """Whether this one may begin its prompt, now."""
        with self.background.guard:
            latest = None if self._latest is None else self._latest()
            busy = latest is not None and not latest.over
            line, mine = self.engine.scheduler, self.engine.decoder.turns.mine
            if busy or mine or self._share < _LEAST_STAYED or not line.idle():
                return False
            self._latest = ref(one)
            return True

    def learn(self, stayed: bool) -> None:
        """Count whether a list stayed as it was found first."""
        with self.background.guard:
            self._share += _LAST * (stayed - self._share)

    def close(self) -> None:
        """Give up what was begun. Closing twice is fine."""
        self.background.close()


class Speculation:
    """One question's prompt, begun with the passages that were found first.

    If a reranker leaves them as they are, it is taken; otherwise it is given up before its next piece. What was read or moved to
    memory for it stays there. Where no prompt may be begun, the passages' KV are moved to memory.

    Args:
        ahead: begins it.
        request: what is asked; the passages come later.
        room: as for :meth:`ragkv.prompting.Prompting.prompt`.
        documents: where passages are read.
        tell: told of what is read.
        owner: asks; where it is gone, nobody wants the prompt.
        known: as for :meth:`ragkv.finding.Finder.read`.

    Attributes:
        outcome: see :attr:`ragkv.FusionReport.speculated`.
        moved: what was moved to memory.
    """

    def __init__(
        self,
        ahead: Ahead,
        request: Request,
        room: Room,
        documents: Documents,
        tell: Tell | None,
        owner: object,
        known: Method | None = None,
    ):
        self.outcome: str = ""
        self.moved: dict[bytes, Moved] = {}
        self._ahead, self._request, self._room = ahead, request, room
        self._documents, self._tell, self._owner = documents, tell, ref(owner)
        self._first: list[int] = []
        self._known = known
        self._process, self._changed = os.getpid(), Condition()
        self._begun = self._done = self._stayed = self._given_up = False
        self._prompt: FusedPrompt | None = None

    @property
    def over(self) -> bool:
        """Whether nothing runs or is kept for it any more, in this process."""
        return self._elsewhere or self._given_up or (self._done and self._prompt is None)

    @property
    def _elsewhere(self) -> bool:
        """In a fork: nobody works at it there, and its lock may be held for ever."""
        return self._process != os.getpid()

    def first(self, hits: list[Hit]) -> None:
        """Begin, with the passages that were found first."""
        self._first = [hit.passage_id for hit in hits]
        may = self._request.past is None and self._ahead.may(self)  # a past's cache is written in place
        if not self._ahead.background.add(partial(self._work, hits, may)):
            self.drop()

    def final(self, found: Found) -> None:
        """Say which passages it is about in the end."""
        if not self._first:
            return
        left_out = {hit.passage_id for hit in found.left_out}
        first, last = [each for each in self._first if each not in left_out], [hit.passage_id for hit in found.hits]
        stayed = first == last if self._known is None else sorted(first) == sorted(last)
        self._ahead.learn(stayed)
        self._stayed = stayed
        if not stayed:
            self.drop()

    def drop(self) -> None:
        """Nobody wants it. Twice, or behind :meth:`take`, is fine."""
        if not self._elsewhere:
            with self._changed:
                self._given_up, self._prompt = True, None

    def take(self, layout: Layout, wait: bool) -> FusedPrompt | None:
        """The prompt, once; ``None`` where it was not begun, or has come to nothing, or is another one.

        Args:
            layout: of the prompt that is asked for.
            wait: wait until it is done, if it is begun.
        """
        if not self._stayed or self._elsewhere:
            return None
        with self._changed:
            if wait and self._begun:
                self._changed.wait_for(lambda: self._done)
            prompt = self._prompt
            self.drop()
        if prompt is None or not torch.equal(prompt.input_ids[0], layout.ids):
            return None
        with self._documents.runner.turn() as fingerprint:
            if prompt.fingerprint != fingerprint:
                return None
        self.outcome = "used"
        return prompt

    def _work(self, hits: list[Hit], may: bool, closing: Event) -> None:
        prompt = None
        try:
            found = self._ahead.finder.read(hits, self._documents, self._known)
            if found.chunks and self._go_on(may):
                with looking(partial(self._look, closing)), told_of_hits(self._tell, found.hits):
                    request = replace(self._request, chunks=found.chunks, ranks=found.ranks(found.chunks))
                    prompt = self._ahead.engine.prompting.ahead(request, self._room)
                self.outcome = "" if prompt is None else self.outcome
            elif found.chunks and not may:
                keys = to_fetch(self._documents, list(self._documents.keys(found.chunks)))
                self._documents.store.prefetch(keys, self.moved)
        except Exception as error:  # whoever asks meets it himself
            logger.debug("a prompt that was begun ahead came to nothing: %r", error)
        finally:
            with self._changed:
                self._prompt, self._done = None if self._given_up else prompt, True
                self._changed.notify_all()

    def _go_on(self, may: bool) -> bool:
        with self._changed:
            self._begun = may and not (self._stayed or self._given_up)
            self.outcome = "dropped" if self._begun else ""  # until it is taken
            return self._begun

    def _look(self, closing: Event) -> None:
        """Go on only while somebody may want it and, as long as nobody does, it is in nobody's way."""
        gone = self._given_up or closing.is_set() or self._owner() is None
        if gone or not (self._stayed or self._ahead.engine.scheduler.idle()):
            raise _GivenUpError
