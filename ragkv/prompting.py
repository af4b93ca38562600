"""Prompts from what was asked, each when its turn has come: their keys and values."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from threading import Event
from time import perf_counter

from ragkv.calibration.kept import resolved
from ragkv.errors import ModelChangedError, RecordError
from ragkv.fuse import fuse
from ragkv.fusing import Places, to_load
from ragkv.gate import Guard
from ragkv.library.documents import Documents
from ragkv.messages import checked_system, opening
from ragkv.methods import Method
from ragkv.model.steps import Meeting
from ragkv.past import Line, Past
from ragkv.report import FusedPrompt
from ragkv.request import Plan, Request, Room, documents_behind, most, room_behind
from ragkv.scheduling.scheduler import Scheduler
from ragkv.scheduling.ticket import Ticket
from ragkv.streaming import results

logger: logging.Logger = logging.getLogger(__name__)

# How often a prompt begins anew because the model was changed meanwhile.
_TRIES = 3
# What transformers' beam search takes for each beam and token of the vocabulary: about four rows of scores in fp32.
_SCORED_BYTES = 16


class Prompting:
    """Makes an engine's prompts.

    Args:
        documents: of the engine.
        scheduler: says when each prompt's turn has come.
        gate: of the engine.
        closing: set where nobody is answered any more.
    """

    def __init__(self, documents: Documents, scheduler: Scheduler, gate: Guard | None, closing: Event):
        self.documents: Documents = documents
        self._scheduler, self._gate, self._closing = scheduler, gate, closing

    def documents_for(self, system: str | None, namespace: str | None, past: Past | None = None) -> Documents:
        """Where passages stand with a system message and in a namespace, ``None``: the engine's own; or behind a past."""
        if past is not None:
            return self.documents.within(past.namespace, past.anchor)
        return documents_behind(self.documents, opening(self.documents.encoder, checked_system(system)), namespace)

    def check(self, request: Request, text: str, room: Room) -> None:
        """Look at a question before its passages are looked for, which takes seconds where it is longer than any prompt may be.

        Args:
            request: without its passages.
            text: what is to be looked for.
            room: as for :meth:`prompt`.

        Raises:
            PromptTooLongError: it is too long by itself.
        """
        limit, _ = most(self.documents, request.most_tokens)
        if limit is None or not isinstance(text, str) or len(text) <= limit:
            return
        if request.past is None:
            with ExitStack() as stack:
                Plan.of(self.documents, request, room, perf_counter(), stack)
        else:
            room_behind(self.documents, len(self.documents.encoder.ids(text)), None, request.most_tokens)

    def prompt(self, request: Request, room: Room, begin: float, stack: ExitStack, copies: int = 1) -> FusedPrompt:
        """A prompt whose keys and values are ready.

        Args:
            request: what it is made of.
            room: that its cache keeps for an answer.
            begin: ``perf_counter()`` at which it was asked for.
            stack: what has to be undone behind the answer.
            copies: that the answer makes of its cache, as beams do.
        """
        plan = Plan.of(self.documents, request, room, begin, stack)
        ticket, begun, past = self._ticket(plan, copies), request.begun, request.past
        with nullcontext() if self._mine else self._scheduler.turn(ticket, stack):
            wait = not self.documents.reader.decoder.turns.mine
            prompt = (None if begun is None else begun.take(plan.layout, wait)) or self._fused(plan)
            self._scheduler.computed(ticket, prompt.report.computed_tokens)
        if begun is not None:
            prompt.report.speculated = begun.outcome
        prompt.spoken = partial(self._scheduler.spoken, ticket)
        if request.keep:
            ids, held, documents = tuple(plan.layout.listed()), plan.layout.tokens, plan.documents
            line = Line(prompt.past_key_values) if past is None else past.line
            prompt.past = Past(ids, held, prompt.fingerprint, documents.anchor, documents.namespace, line, plan.turns)
        return prompt

    def ahead(self, request: Request, room: Room) -> FusedPrompt | None:
        """A prompt that may be asked for soon, made beside the line; ``None`` where there is no room for it.

        Args:
            request, room: as for :meth:`prompt`; it goes on from no past.
        """
        with ExitStack() as stack:
            plan = Plan.of(self.documents, request, room, perf_counter(), stack)
            if not self._scheduler.idle(self._ticket(plan)):
                return None
            with self._scheduler.within():
                return self._fused(plan)

    def prompts(self, requests: Sequence[Request], room: Room, begin: float) -> list[FusedPrompt]:
        """Several prompts at the same time: what each has to compute goes into one pass, as far as the model takes it.

        Args:
            requests, room, begin: as for :meth:`prompt`; nothing is kept of them.
        """
        if self._mine or not requests:
            return [self.alone(request, room, begin) for request in requests]
        with ExitStack() as stack:
            plans = [Plan.of(self.documents, request, room, begin, stack) for request in requests]
            tickets = [self._ticket(plan) for plan in plans]
            all_of_them = replace(
                tickets[0],
                tokens=sum(ticket.tokens for ticket in tickets),
                needs_bytes=sum(ticket.needs_bytes for ticket in tickets),
                stored=lambda: sum(ticket.stored() for ticket in tickets),
                prefetch=lambda: [ticket.prefetch() for ticket in tickets],
            )
            meeting = Meeting(len(plans))

            def make(plan: Plan) -> FusedPrompt:
                try:
                    with self._scheduler.within():
                        return self._fused(plan, meeting)
                finally:
                    meeting.leave()

            with self._scheduler.turn(all_of_them, stack), ThreadPoolExecutor(len(plans), "ragkv-fuse") as pool:
                try:  # none is cancelled later: the others would wait for it
                    making = [pool.submit(make, plan) for plan in plans]
                except BaseException:  # no more threads, or interrupted
                    meeting.end()
                    raise
                prompts = results(making)
                self._scheduler.computed(all_of_them, sum(prompt.report.computed_tokens for prompt in prompts))
            return prompts

    def alone(self, request: Request, room: Room, begin: float) -> FusedPrompt:
        """A prompt that nobody answers."""
        with ExitStack() as stack:
            return self.prompt(request, room, begin, stack)

    def wait(self) -> None:
        """Wait until no prompt is computed any more, where none begins; those that wait for this thread apart."""
        if not self._mine:
            self._scheduler.wait(self._closing)

    @property
    def _mine(self) -> bool:
        """Whether those in front in the line wait for this thread."""
        return self._scheduler.mine or self.documents.reader.decoder.turns.mine

    def _ticket(self, plan: Plan, copies: int = 1) -> Ticket:
        """What the scheduler is told of a prompt whose cache there are so many copies of, in the end."""
        layout, documents, request = plan.layout, plan.documents, plan.request
        decoder, store = documents.reader.decoder, documents.store
        token_bytes = sum(spec.token_bytes for spec in decoder.specs)
        needs = copies * token_bytes * (layout.tokens + plan.room_tokens)
        if copies > 1:
            needs += copies * decoder.vocab_size * _SCORED_BYTES
        begun = request.begun is not None and request.begun.outcome  # "dropped", until it is taken

        def stored() -> int:
            tiers = Places(documents, layout, [documents.key(placed.chunk) for placed in layout.chunks]).tiers
            held = sum(len(placed.chunk) for placed, tier in zip(layout.chunks, tiers, strict=True) if tier is not None)
            return held + (0 if layout.held else layout.opening)

        def prefetch() -> None:
            store.prefetch(to_load(documents, layout, resolved(request.method, documents, plan.begins)))

        return Ticket(
            documents.namespace,
            layout.tokens - layout.held,
            needs_bytes=needs,
            answer_bytes=needs - token_bytes * layout.tokens,
            held_bytes=token_bytes * (layout.tokens if begun else layout.held),
            device=decoder.device,
            priority=request.priority,
            deadline_s=request.deadline_s,
            stop=request.stop,
            closing=self._closing,
            stored=stored,
            prefetch=prefetch,
        )

    def _fused(self, plan: Plan, meeting: Meeting | None = None) -> FusedPrompt:
        """One prompt; begun anew when a record proves damaged, which the store has dropped then, or the model has changed."""
        damaged, layout, past = set[str](), plan.layout, plan.request.past
        behind = plan.stack if meeting is None else None  # the others need the place

        def once() -> FusedPrompt:
            def make(method: Method) -> FusedPrompt:
                return fuse(plan.documents, layout, method, plan.room_tokens, plan.begin, past, meeting, behind)

            asked = resolved(plan.request.method, plan.documents, plan.begins)
            return make(asked) if self._gate is None else self._gate.fused(asked, layout, make)

        for _ in range(len(layout.chunks) + _TRIES):
            try:
                return once()
            except ModelChangedError as error:
                if past is not None:
                    raise  # what was said was computed by another model
                logger.warning("fusing again: %s", str(error))
            except RecordError as error:
                if str(error) in damaged:
                    raise  # it was not dropped
                damaged.add(str(error))
                logger.warning("reading chunks again: %s", str(error))
        return once()
