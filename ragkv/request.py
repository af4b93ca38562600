"""What is asked for, and how it is laid out: a prompt's ids, its chunks, its room."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event
from time import perf_counter
from typing import Any, Protocol, cast

from ragkv.chunk import Chunk
from ragkv.errors import ArgumentError, PromptTooLongError, instance, is_number
from ragkv.fusion.layout import Layout, lay_out
from ragkv.library.documents import Documents
from ragkv.library.given import several
from ragkv.messages import Question, asked, going_on, is_chat
from ragkv.methods import Method
from ragkv.model.generation import DEFAULT_NEW_TOKENS, stopping
from ragkv.past import Past
from ragkv.prompt import Text
from ragkv.report import FusedPrompt

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
        instance(
            "past", self.past, Past | None, "answer.past of an earlier answer that was asked for with keep_past=True"
        )
        instance("keep_past", self.keep, bool, "True or False")
        object.__setattr__(self, "keep", self.keep or self.past is not None)
        given = is_chat(self.question) or self.system is not None or self.namespace is not None
        if self.past is not None and given:
            raise ArgumentError("the past has its system message, namespace and messages: give the next question alone")


def scheduling(generation: dict[str, Any]) -> dict[str, Any]:
    """What of a call's generation arguments says when it is answered, as a :class:`Request` has it; it is taken out of them."""
    priority, deadline_s = generation.pop("priority", 0), generation.pop("deadline_s", math.inf)
    instance("priority", priority, int, "a whole number: those of a higher one go first")
    if not is_number(deadline_s) or not deadline_s > 0:
        raise ArgumentError(f"deadline_s must be seconds, more than 0, got {deadline_s!r:.80}")
    stop = stopping(generation)
    asked_s = perf_counter() if stop is None else stop.asked_s
    return {"stop": stop, "priority": priority, "deadline_s": asked_s + deadline_s}


@dataclass(frozen=True, eq=False)
class Plan:
    """A prompt that is laid out.

    Attributes:
        request: what it is made of.
        documents: whose chunks they are.
        layout: of the prompt.
        room_tokens: room for the answer.
        begin: ``perf_counter()`` at which it was asked for.
        begins: what the prompt begins with; ``None`` where it goes on from a past.
        turns: whose turns stand there.
        stack: closed behind the answer.
    """

    request: Request
    documents: Documents
    layout: Layout
    room_tokens: int
    begin: float
    begins: tuple[int, ...] | None
    turns: tuple[object, ...]
    stack: ExitStack

    @classmethod
    def of(cls, documents: Documents, request: Request, room: Room, begin: float, stack: ExitStack) -> Plan:
        """A request, checked and laid out.

        Args:
            documents: of the engine.
            request, room, begin, stack: as for :meth:`ragkv.prompting.Prompting.prompt`.
        """
        encoder, past, begins, held = documents.encoder, request.past, None, 0
        slots = encoder.slots(request.slots, request.ranks)
        if past is None:
            prefix, suffix, begins = asked(encoder, request.question, request.system, slots)
            documents = documents_behind(documents, begins, request.namespace)
        else:
            documents = documents.within(past.namespace, past.anchor)
            between, suffix = going_on(encoder, cast(Text, request.question), slots)
            prefix, held = (*past.ids, *between), past.held
        chunks = _chunks(documents, request.chunks)
        if past is not None and not chunks:  # one pass for all that is new
            prefix, suffix = prefix[:held], (*prefix[held:], *suffix)
        starts = None if request.starts is None else several(request.starts, "starts")
        device = documents.reader.decoder.device
        layout = lay_out(prefix, documents.anchor, chunks, suffix, device, starts, begins, held)
        tokens = room_behind(documents, layout.end, room(layout.end), request.most_tokens)
        turns = () if past is None else stack.enter_context(past.going_on(request.stop))
        return cls(request, documents, layout, tokens, begin, begins, turns, stack)


def documents_behind(documents: Documents, begins: tuple[int, ...], namespace: str | None) -> Documents:
    """Documents behind what a prompt begins with, or behind the template's anchor."""
    return documents.within(namespace, begins if documents.encoder.template.anchor is None else None)


def _chunks(documents: Documents, given: Sequence[Chunk | Text]) -> list[Chunk]:
    """Chunks as they are; text and ids as passages that stand alone."""
    known = [chunk if isinstance(chunk, Chunk) else documents.passage(chunk) for chunk in several(given, "chunks")]
    limit = documents.reader.decoder.max_positions
    for chunk in known:
        if chunk.highest >= documents.encoder.vocab_size:
            documents.encoder.ids(chunk.ids)  # says which
        end = len(documents.anchor) + chunk.offset + len(chunk)
        if limit is not None and end > limit:
            raise PromptTooLongError(
                f"a chunk ends {end} tokens behind the beginning of what it is read behind, {end - limit} more than the "
                f"model's {limit} positions: give a shorter system message, or the template an anchor="
            )
    return known


def most(documents: Documents, most_tokens: int | None) -> tuple[int | None, str]:
    """The most tokens of a prompt and its answer, and what says so; ``None`` where nothing does."""
    positions = documents.reader.decoder.max_positions
    if most_tokens is not None and (positions is None or most_tokens < positions):
        return most_tokens, f"context_tokens={most_tokens}"
    return positions, f"the model's {positions} positions"


def room_behind(documents: Documents, tokens: int, wanted: int | None, most_tokens: int | None) -> int:
    """Room for an answer; its last token takes no position, for the model never runs it."""
    limit, whose = most(documents, most_tokens)
    if limit is not None and tokens > limit:
        raise PromptTooLongError(
            f"the prompt has {tokens} tokens, {tokens - limit} more than {whose}: give fewer or shorter chunks, or a shorter "
            "question"
        )
    left = None if limit is None else limit + 1 - tokens
    if left is None or (wanted is not None and wanted <= left):
        return DEFAULT_NEW_TOKENS if wanted is None else wanted
    if wanted is not None:
        raise PromptTooLongError(
            f"the prompt's {tokens} tokens leave room for {left} more in {whose}, and {wanted} were asked for: give fewer or "
            "shorter chunks, or ask for a shorter answer"
        )
    return min(DEFAULT_NEW_TOKENS, left)
