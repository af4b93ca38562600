"""An engine's prompts: fused, and answered whole or piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import Event
from time import perf_counter
from typing import Any

from ragkv.answering import Answering, AnswerStream
from ragkv.chunk import Chunk
from ragkv.errors import whole_number
from ragkv.gate import Guard
from ragkv.library.documents import Documents
from ragkv.library.given import pairs
from ragkv.messages import Question
from ragkv.methods import Method
from ragkv.methods.words import as_method
from ragkv.past import Past
from ragkv.prompt import Text
from ragkv.prompting import Prompting
from ragkv.report import Answer, FusedPrompt
from ragkv.request import Request, Room, scheduling
from ragkv.scheduling.scheduler import Scheduler
from ragkv.streaming import side_by_side


class Generating:
    """What an :class:`~ragkv.Engine` does with questions.

    Attributes:
        documents: what the model has read, see :class:`~ragkv.library.documents.Documents`.
        method: how prompts are put together, unless a call says otherwise.
        gate: the gate at work, see :class:`~ragkv.gate.Guard`; ``None`` where there is none.
        scheduler: says which of the calls that are made at the same time goes first.
        closing: set when the engine is closed: nobody is answered any more.
    """

    documents: Documents
    method: Method
    gate: Guard | None
    scheduler: Scheduler
    closing: Event

    def fuse(
        self,
        chunks: Sequence[Chunk | Text],
        question: Question,
        *,
        method: Method | str | None = None,
        room_tokens: int | None = None,
        starts: Sequence[int] | None = None,
        system: str | None = None,
        namespace: str | None = None,
        slots: Mapping[str, Text] | None = None,
    ) -> FusedPrompt:
        """Put prefix, chunks and question together as one prompt, computing only what the method asks for.

        Chunks that the store has lost are read again, in the context that they had.

        Args:
            chunks: from :meth:`add` or :meth:`add_document`, in the order of the prompt; text or ids are added on the way. May be
                empty, and may hold a chunk twice.
            question: text or token ids, not empty; or chat messages, ``{"role": "system" | "user" | "assistant", "content": ...}``
                each, of which the last one is the user's question. The chunks belong to it.
            method: instead of the engine's.
            room_tokens: room that the cache keeps for an answer; by default 64, or as much as the model's positions leave.
            starts: position of each chunk's first token, where chunks shall stand apart or share positions (as in APE,
                arXiv:2502.05431); by default each stands right behind the one before. A decoding loop of your own goes on at
                ``prompt.next_position``; layers with windows count slots there, as transformers does.
            system: a system message instead of the template's. Where the template has no anchor, chunks are read behind it.
            namespace: instead of the engine's.
            slots: what stands in the template's slots (:attr:`PromptTemplate.slots`).

        Raises:
            PromptError: an empty question or chunk, or ids out of the vocabulary; messages that are not understood, or that the
                chat template cannot write; a slot that the template has not.
            PromptTooLongError: the prompt, and the room that was asked for, exceed the model's positions.
        """
        begin, room = perf_counter(), _room(room_tokens)
        request = Request(chunks, question, self.method_of(method), system, namespace, slots, starts=starts)
        return self.prompting.alone(request, room, begin)

    def fuse_many(
        self,
        requests: Sequence[tuple[Sequence[Chunk | Text], Question]],
        *,
        method: Method | str | None = None,
        room_tokens: int | None = None,
        system: str | None = None,
        namespace: str | None = None,
        slots: Mapping[str, Text] | None = None,
    ) -> list[FusedPrompt]:
        """:meth:`fuse` for several at the same time: what the methods choose, and the questions, run through the model together.

        Args:
            requests: chunks and question of each.
            method, room_tokens, system, namespace, slots: as for :meth:`fuse`, the same for all.

        Returns:
            The prompts, in order; each is what it would be alone.

        Raises:
            As :meth:`fuse`, and OverloadedError where there is no memory for all of them.
        """
        begin, room, chosen = perf_counter(), _room(room_tokens), self.method_of(method)
        asked = [Request(*one, chosen, system, namespace, slots) for one in pairs(requests)]
        return self.prompting.prompts(asked, room, begin)

    def generate(
        self,
        chunks: Sequence[Chunk | Text],
        question: Question,
        *,
        method: Method | str | None = None,
        system: str | None = None,
        namespace: str | None = None,
        slots: Mapping[str, Text] | None = None,
        past: Past | None = None,
        keep_past: bool = False,
        stop: str | Sequence[str] = (),
        **generation: Any,
    ) -> Answer:
        """Answer a question over chunks.

        Args:
            chunks, question, method, system, namespace, slots: as for :meth:`fuse`.
            past: of an answer that this one goes on from: what was said there is not computed again. It has its system message,
                its namespace and all earlier turns; chunks that stand there already need not be given.
            keep_past: keep the KV of prompt and answer in ``answer.past``, which the next call may be given; always so where a
                ``past`` was given.
            stop: a text or several at which the answer ends, besides the template's; they are no part of it, while
                ``stop_strings``, as in transformers, are.
            **generation: what ``model.generate`` takes: ``max_new_tokens``, ``do_sample``, ``stop_strings``, ``num_beams``, ...
                Each does what it does there, or is refused; the model's own generation config holds for the rest. And two more.
                ``schema``: the answer is JSON that fits it (``ragkv[json]``): a JSON schema as a dict, a pydantic model's class, or
                ``"json"`` for any object; ``answer.value`` is what it says. ``logprobs``: ``True`` for the log-probability of each
                token, a number for those of so many likeliest ones besides, as ``answer.logprobs``. ``priority`` and
                ``deadline_s``: see :class:`~ragkv.Scheduler`.

        Raises:
            As :meth:`fuse`; UnknownArgumentError (a ``TypeError``) and ArgumentError (a ``ValueError``) for generation arguments;
            NonFiniteError where the logits are NaN or infinite; DeadlineError and OverloadedError, see :class:`~ragkv.Scheduler`;
            ModelChangedError where the model changes in the middle of the
            answer, or has changed since the past was computed; ConversationError where the past is in use, or is gone.
        """
        begin = perf_counter()
        asked = Request(chunks, question, self.method_of(method), system, namespace, slots, past, keep_past)
        return self._answering(asked, stop, generation).whole(begin)

    def generate_many(
        self, requests: Sequence[tuple[Sequence[Chunk | Text], Question]], *, at_once: int = 8, **options: Any
    ) -> list[Answer]:
        """Answer several questions side by side: what each of them computes shares the others' forward passes.

        So do calls of :meth:`generate` and :meth:`stream` that several threads make at the same time. Each answer is what it would
        be alone; sampled ones are drawn from one random generator.

        Args:
            requests: chunks and question of each, as for :meth:`generate`.
            at_once: how many are worked on at a time; each holds its prompt's KV in memory.
            **options: as for :meth:`generate`, the same for all.

        Returns:
            The answers, in order.

        Raises:
            As :meth:`generate`: the first one that fails ends all.
        """
        return side_by_side(lambda one, **given: self.generate(*one, **given), pairs(requests), at_once, **options)

    def stream(
        self,
        chunks: Sequence[Chunk | Text],
        question: Question,
        *,
        method: Method | str | None = None,
        system: str | None = None,
        namespace: str | None = None,
        slots: Mapping[str, Text] | None = None,
        past: Past | None = None,
        keep_past: bool = False,
        stop: str | Sequence[str] = (),
        **generation: Any,
    ) -> AnswerStream:
        """Answer a question over chunks, piece by piece as text.

        The prompt is fused when the first piece is asked for.

        Args:
            chunks, question, method, system, namespace, slots: as for :meth:`fuse`.
            past, keep_past: as for :meth:`generate`; ``past`` of the stream is there behind the last piece.
            stop: as for :meth:`generate`; not even half a stop text is shown.
            **generation: as for :meth:`generate`; no beams.

        Returns:
            The pieces; joined they are the answer's text. Its ``report`` and ``token_ids`` grow with them.

        Raises:
            As :meth:`generate`, arguments at once and all else when the first piece is asked for; PromptError where the engine has
            no tokenizer.
        """
        asked = Request(chunks, question, self.method_of(method), system, namespace, slots, past, keep_past)
        return self._answering(asked, stop, generation, pieces=True).pieces()

    @property
    def prompting(self) -> Prompting:
        """Makes prompts."""
        return Prompting(self.documents, self.scheduler, self.gate, self.closing)

    def _answering(
        self, request: Request, stop: str | Sequence[str], generation: dict[str, Any], pieces: bool = False
    ) -> Answering:
        request = replace(request, **scheduling(generation))
        make = partial(self.prompting.prompt, request)
        return Answering(self.documents, make, stop, generation, self.closing, pieces, request.keep)

    def method_of(self, method: Method | str | None) -> Method:
        """A method as it is given to a call: by default the engine's."""
        return self.method if method is None else as_method(method)


def _room(tokens: int | None) -> Room:
    if tokens is not None:
        whole_number("room_tokens", tokens)
    return lambda _: tokens
