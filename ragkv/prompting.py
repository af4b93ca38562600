"""One prompt from what was asked: its ids, its layout, its room, its keys and values."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from time import perf_counter
from typing import Any, Protocol, cast

from ragkv.calibration.kept import resolved
from ragkv.chunk import Chunk
from ragkv.errors import ArgumentError, ModelChangedError, PromptTooLongError, RecordError, instance
from ragkv.fuse import fuse
from ragkv.fusion.layout import Layout, lay_out
from ragkv.gate import Guard
from ragkv.library.documents import Documents
from ragkv.library.given import several
from ragkv.messages import Question, asked, checked_system, going_on, is_chat, opening
from ragkv.methods import Method
from ragkv.model.generation import DEFAULT_NEW_TOKENS, stopping
from ragkv.model.steps import Meeting
from ragkv.past import Line, Past
from ragkv.places import Places, to_load
from ragkv.prompt import Encoder, Text
from ragkv.report import FusedPrompt
from ragkv.scheduling.scheduler import Scheduler
from ragkv.scheduling.ticket import Ticket

logger: logging.Logger = logging.getLogger(__name__)

# How often a prompt begins anew because the model was changed meanwhile.
_TRIES = 3

#: The tokens that a call asks for behind a prompt of so many; ``None`` where it does not say.
Room = Callable[[int], int | None]


class Begun(Protocol):
    """See :class:`ragkv.speculation.Speculation`."""

    outcome: str

    def take(self, layout: Layout, wait: bool) -> FusedPrompt | None:
        """The prompt, if it is this one."""
        ...


@dataclass(frozen=True)
class Request:
    """What a prompt is made of: the arguments of :meth:`ragkv.Engine.fuse` and :meth:`~ragkv.Engine.generate`.

    Attributes:
        chunks: chunks, texts or ids.
        question: text, ids or messages.
        method: puts them together.
        system: in the place of the template's system message.
        namespace: in the place of the engine's.
        slots: what stands in the template's slots.
        past: what the prompt goes on from.
        keep: the prompt is to be gone on from; always so where it goes on from another.
        starts: position of each chunk.
        stop: stops the answer when it is set.
        most_tokens: of prompt and answer, if fewer than the model has positions.
        priority: those of a higher one go first.
        deadline_s: ``perf_counter()`` behind which nobody wants the answer.
        begun: a prompt that may have been begun before it was known what stands in it.
        ranks: where the chunks stand, the most relevant first, for a slot of this name.
    """

    chunks: Sequence[Chunk | Text]
    question: Question
    method: Method
    system: str | None = None
    namespace: str | None = None
    slots: Mapping[str, Text] | None = None
    past: Past | None = None
    keep: bool = False
    starts: Sequence[int] | None = None
    stop: Event | None = None
    most_tokens: int | None = None
    priority: int = 0
    deadline_s: float = math.inf
    begun: Begun | None = None
    ranks: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", self.keep or self.past is not None)


@dataclass(frozen=True, eq=False)
class _Plan:
    """A prompt that is laid out.

    Attributes:
        request, begin: as for :meth:`Prompting.prompt`.
        documents: whose chunks they are.
        layout: of the prompt.
        room_tokens: room for the answer.
        begins: what the prompt begins with; ``None`` where it goes on from a past,
        turns: whose turns these are.
    """

    request: Request
    documents: Documents
    layout: Layout
    room_tokens: int
    begin: float
    begins: tuple[int, ...] | None
    turns: tuple[object, ...]


def scheduling(generation: dict[str, Any]) -> dict[str, Any]:
    """What of a call's generation arguments says when it is answered, as a :class:`Request` has it; it is taken out of them."""
    priority, deadline_s = generation.pop("priority", 0), generation.pop("deadline_s", math.inf)
    instance("priority", priority, int, "a whole number: those of a higher one go first")
    if not isinstance(deadline_s, int | float) or not deadline_s > 0:
        raise ArgumentError(f"deadline_s must be seconds, more than 0, got {deadline_s!r}")
    stop = stopping(generation)
    asked_s = perf_counter() if stop is None else stop.asked_s
    return {"stop": stop, "priority": priority, "deadline_s": asked_s + deadline_s}


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
        self.encoder: Encoder = documents.encoder
        self._scheduler, self._gate, self._closing = scheduler, gate, closing

    def documents_for(self, system: str | None, namespace: str | None) -> Documents:
        """Where passages stand with a system message and in a namespace; ``None``: the engine's own."""
        return self._placed(opening(self.encoder, checked_system(system)), namespace)

    def prompt(self, request: Request, room: Room, begin: float, stack: ExitStack, copies: int = 1) -> FusedPrompt:
        """A prompt whose keys and values are ready.

        Args:
            request: what it is made of.
            room: that its cache keeps for an answer.
            begin: ``perf_counter()`` at which it was asked for.
            stack: what has to be undone behind the answer.
            copies: that the answer makes of its cache, as beams do.
        """
        plan = self._plan(request, room, begin, stack)
        ticket = self._ticket(plan, copies)
        with nullcontext() if self._mine else self._scheduler.turn(ticket, stack):
            prompt = self._taken(plan) or self._fused(plan)
            self._scheduler.computed(ticket, prompt.report.computed_tokens)
        if request.begun is not None:
            prompt.report.speculated = request.begun.outcome
        prompt.spoken = partial(self._scheduler.spoken, ticket)
        if request.keep:
            past = request.past
            line = Line(prompt.past_key_values) if past is None else past.line
            prompt.past = Past(
                tuple(plan.layout.listed()),
                plan.layout.tokens,
                prompt.fingerprint,
                plan.documents.anchor,
                plan.documents.namespace,
                line,
                plan.turns,
            )
        return prompt

    def ahead(self, request: Request, room: Room) -> FusedPrompt | None:
        """A prompt that may be asked for soon, made beside the line; ``None`` where there is no room for it.

        Args:
            request, room: as for :meth:`prompt`; it goes on from no past.
        """
        with ExitStack() as stack:
            plan = self._plan(request, room, perf_counter(), stack)
            if not self._scheduler.idle(self._ticket(plan)):
                return None
            with self._scheduler.within():
                return self._fused(plan)

    def prompts(self, requests: Sequence[Request], room: Room, begin: float) -> list[FusedPrompt]:
        """Several prompts at the same time: what each has to compute goes into one pass, as far as the model takes it.

        Args:
            requests, room, begin: as for :meth:`prompt`; nothing is kept of them.
        """
        with ExitStack() as stack:
            if self._mine or not requests:
                return [self.prompt(request, room, begin, stack) for request in requests]
            plans = [self._plan(request, room, begin, stack) for request in requests]
            tickets = [self._ticket(plan) for plan in plans]
            all_of_them = replace(
                tickets[0],
                tokens=sum(ticket.tokens for ticket in tickets),
                needs_bytes=sum(ticket.needs_bytes for ticket in tickets),
                stored=lambda: sum(ticket.stored() for ticket in tickets),
                prefetch=lambda: [ticket.prefetch() for ticket in tickets],
            )
            meeting = Meeting(len(plans))

            def make(plan: _Plan) -> FusedPrompt:
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
                prompts = [one.result() for one in making]
                self._scheduler.computed(all_of_them, sum(prompt.report.computed_tokens for prompt in prompts))
            return prompts

    def wait(self) -> None:
        """Wait until no prompt is computed any more, where none begins; those that wait for this thread apart."""
        if not self._mine:
            self._scheduler.wait(self._closing)

    @property
    def _mine(self) -> bool:
        """Whether those in front in the line wait for this thread."""
        return self._scheduler.mine or self.documents.reader.decoder.turns.mine

    def _plan(self, request: Request, room: Room, begin: float, stack: ExitStack) -> _Plan:
        past, begins, held, slots = request.past, None, 0, self.encoder.slots(request.slots, request.ranks)
        if past is None:
            prefix, suffix, begins = asked(self.encoder, request.question, request.system, slots)
            documents = self._placed(begins, request.namespace)
        else:
            if is_chat(request.question) or request.system is not None or request.namespace is not None:
                raise ArgumentError(
                    "the past has its system message, namespace and messages: give the next question alone"
                )
            documents = self.documents.within(past.namespace, past.anchor)
            behind, suffix = going_on(self.encoder, cast(Text, request.question), slots)
            prefix, held = (*past.ids, *behind), past.held
        chunks = self._chunks(documents, request.chunks)
        if past is not None and not chunks:  # one pass for all that is new
            prefix, suffix = prefix[:held], (*prefix[held:], *suffix)
        starts = None if request.starts is None else several(request.starts, "starts")
        device = documents.reader.decoder.device
        layout = lay_out(prefix, documents.anchor, chunks, suffix, device, starts, begins, held)
        tokens = self._room(layout.end, room(layout.end), request.most_tokens)
        turns = () if past is None else stack.enter_context(past.going_on(request.stop))
        return _Plan(request, documents, layout, tokens, begin, begins, turns)

    def _ticket(self, plan: _Plan, copies: int = 1) -> Ticket:
        """What the scheduler is told of a prompt whose cache there are so many copies of, in the end."""
        layout, documents, request = plan.layout, plan.documents, plan.request
        decoder, store = documents.reader.decoder, documents.store
        token_bytes = sum(spec.token_bytes for spec in decoder.specs)
        needs = copies * token_bytes * (layout.tokens + plan.room_tokens)

        def keys() -> list[bytes]:
            return [documents.key(placed.chunk) for placed in layout.chunks]

        def stored() -> int:
            tiers = Places(documents, layout, keys()).tiers()
            held = sum(len(placed.chunk) for placed, tier in zip(layout.chunks, tiers, strict=True) if tier is not None)
            return held + (0 if layout.held else layout.opening)

        def prefetch() -> None:
            store.prefetch(to_load(documents, layout, resolved(request.method, documents, plan.begins)))

        return Ticket(
            documents.namespace,
            layout.tokens - layout.held,
            needs_bytes=needs,
            answer_bytes=needs - token_bytes * layout.tokens,
            device=decoder.device,
            priority=request.priority,
            deadline_s=request.deadline_s,
            stop=request.stop,
            closing=self._closing,
            stored=stored,
            prefetch=prefetch,
        )

    def _taken(self, plan: _Plan) -> FusedPrompt | None:
        """The prompt, if it was begun before."""
        begun, turns = plan.request.begun, self.documents.reader.decoder.turns
        return None if begun is None else begun.take(plan.layout, wait=not turns.mine)

    def _fused(self, plan: _Plan, meeting: Meeting | None = None) -> FusedPrompt:
        """One prompt; begun anew when a record proves damaged, which the store has dropped then, or the model has changed."""
        damaged, layout, past = set[str](), plan.layout, plan.request.past

        def once() -> FusedPrompt:
            def make(method: Method) -> FusedPrompt:
                return fuse(plan.documents, layout, method, plan.room_tokens, plan.begin, past, meeting)

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

    def _placed(self, begins: tuple[int, ...], namespace: str | None) -> Documents:
        """Documents behind what a prompt begins with, or behind the template's anchor."""
        return self.documents.within(namespace, begins if self.encoder.template.anchor is None else None)

    def _chunks(self, documents: Documents, given: Sequence[Chunk | Text]) -> list[Chunk]:
        """Chunks as they are; text and ids as passages that stand alone."""
        known = [chunk if isinstance(chunk, Chunk) else documents.passage(chunk) for chunk in several(given, "chunks")]
        limit = documents.reader.decoder.max_positions
        for chunk in known:
            if chunk.highest >= self.encoder.vocab_size:
                self.encoder.ids(chunk.ids)  # says which
            behind = len(documents.anchor) + chunk.offset + len(chunk)
            if limit is not None and behind > limit:
                raise PromptTooLongError(
                    f"a chunk ends {behind} tokens behind the beginning of what it is read behind, {behind - limit} more than the "
                    f"model's {limit} positions: give a shorter system message, or the template an anchor="
                )
        return known

    def _room(self, tokens: int, asked: int | None, most_tokens: int | None) -> int:
        """Room for an answer; its last token takes no position, for the model never runs it."""
        limits = [limit for limit in (self.documents.reader.decoder.max_positions, most_tokens) if limit is not None]
        limit = min(limits, default=None)
        if limit is not None and tokens > limit:
            raise PromptTooLongError(
                f"the prompt has {tokens} tokens, {tokens - limit} more than the model's {limit} positions: give fewer or shorter "
                "chunks"
            )
        left = None if limit is None else limit + 1 - tokens
        if left is None or (asked is not None and asked <= left):
            return DEFAULT_NEW_TOKENS if asked is None else asked
        if asked is not None:
            raise PromptTooLongError(
                f"the prompt's {tokens} tokens leave room for {left} more in the model's {limit} positions, and {asked} were asked "
                "for: give fewer or shorter chunks, or ask for a shorter answer"
            )
        return min(DEFAULT_NEW_TOKENS, left)
