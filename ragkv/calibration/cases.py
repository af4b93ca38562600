"""What a calibration asks: questions over passages that are given, found, or brought along by a data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

from ragkv.chunk import Chunk, digest
from ragkv.errors import ArgumentTypeError, CalibrationError, listable
from ragkv.library.documents import Documents
from ragkv.library.measured import Measured
from ragkv.methods import Method
from ragkv.report import Answer, FusedPrompt
from ragkv.store import TieredStore

#: Fields by which a record brings its passages along; without them it is a question alone.
_PASSAGES = ("documents", "ctxs", "context", "paragraphs", "input", "data")
_MUST = (
    "each of cases must be a case of ragkv.evaluation.read_cases, or (chunks, question), or (chunks, question, answers) where F1 "
    "is asked for; for a RAG also a question, or {'question': ..., 'answers': [...]}"
)

#: Letters of a key that name question and answers.
ASKED = 16

#: Finds the passages for a question.
Find = Callable[[str], Sequence[Chunk]]


class Asks(Protocol):
    """What a calibration needs of a :class:`~ragkv.Engine`."""

    documents: Documents
    store: TieredStore

    def fuse(self, chunks: Any, question: Any, *, method: Any, room_tokens: int | None) -> FusedPrompt:
        """See :meth:`ragkv.Engine.fuse`."""

    def generate(self, chunks: Any, question: Any, *, method: Any, **generation: Any) -> Answer:
        """See :meth:`ragkv.Engine.generate`."""


class Trial:
    """A question and where its passages come from.

    Args:
        engine: asks.
        question: text, ids or messages.
        answers: every answer that counts as right.
        chunks: gives the passages.

    Attributes:
        engine, question, answers: as given.
    """

    def __init__(self, engine: Asks, question: Any, answers: Sequence[str], chunks: Callable[[], Sequence[Chunk]]):
        self.engine: Asks = engine
        self.question: Any = question
        self.answers: tuple[str, ...] = tuple(answers)
        self._chunks = cache(chunks)  # they are asked for to know it by, and to be placed

    @property
    def about(self) -> object:
        """Equal where cases are no draws of their own, since they bring the same document along."""
        return self

    @property
    def asked(self) -> str:
        """Its question and answers, before the passages are known; :meth:`key` begins so."""
        return digest(repr(self.question), repr(self.answers)).hex()[:ASKED]

    def key(self) -> str:
        """What is measured is known by this: question, answers and passages in their context."""
        placed = [part for chunk in self._chunks() for part in (chunk.ids, chunk.context)]
        return self.asked + digest(*placed).hex()[:32]

    def chunks(self) -> AbstractContextManager[Sequence[Chunk]]:
        """A block in which the passages may be asked about."""
        return nullcontext(self._chunks())


class _CaseTrial(Trial):
    """A case that brings its documents along: they are read for it alone, in memory, and forgotten behind it."""

    def __init__(self, engine: Asks, case: Any):
        super().__init__(engine, case.question, _answers(case.answers), list)
        self._case = case

    @property
    def about(self) -> object:
        return self._case.about

    @property
    def asked(self) -> str:
        return self.key()[:ASKED]

    def key(self) -> str:
        return str(self._case.fingerprint)

    @contextmanager
    def chunks(self) -> Iterator[Sequence[Chunk]]:
        engine: Any = self.engine
        numbers = dict.fromkeys(document for document, _ in self._case.retrieved)
        read = {number: engine.add_document(list(self._case.documents[number])) for number in numbers}
        try:
            yield [read[document][chunk] for document, chunk in self._case.retrieved]
        finally:
            engine.forget([chunk for chunks in read.values() for chunk in chunks])


def trials_of(engine: Asks, cases: Iterable[Any], ladder: Sequence[Method], find: Find | None = None) -> list[Trial]:
    """Cases as trials.

    Args:
        engine: of the model.
        cases: see :func:`ragkv.calibration.calibrate`.
        ladder: documents that cases bring along are read with what these need.
        find: finds the passages for questions that come without.

    Raises:
        ArgumentTypeError: one is no case.
    """
    if isinstance(cases, str | Mapping) or not isinstance(cases, Iterable):
        raise ArgumentTypeError(f"cases must be a list; {_MUST}; got {cases!r:.80}")
    apart: Any = copy(engine)
    apart.store = TieredStore(policy="lru")
    apart.documents = engine.documents.over(apart.store, Measured.by(*ladder))
    made = list[Trial]()
    for case in cases:
        if hasattr(case, "retrieved") and hasattr(case, "documents"):
            made.append(_CaseTrial(apart, case))
        elif find is not None and isinstance(case, str | Mapping):
            made.append(_found(engine, case, find))
        elif isinstance(case, tuple) and len(case) in (2, 3) and listable(case[0]) and not isinstance(case[0], Chunk):
            made.append(
                Trial(engine, case[1], _answers(case[2] if case[2:] else None), partial(_chunks, engine, list(case[0])))
            )
        else:
            raise ArgumentTypeError(f"{_MUST}; got {case!r:.80}")
    return made


def one_each(trials: Iterable[Trial]) -> list[Trial]:
    """Of the cases about one document the first: what a method loses on them hangs on it, so they are one draw and not several."""
    first: dict[object, Trial] = {}
    for trial in trials:
        first.setdefault(trial.about, trial)
    return list(first.values())


def read_questions(path: str | Path) -> list[dict[str, Any]] | None:
    """The questions of a file of JSON lines, ``{"question": ...}`` each, with ``answers`` if you like; ``None``: another form.

    Raises:
        CalibrationError: a line is none, though the first one is.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        first = next((json.loads(line) for line in lines if line.strip()), None)
    except ValueError:
        return None
    if not isinstance(first, dict) or "question" not in first or any(field in first for field in _PASSAGES):
        return None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            asked = record["question"]
        except (ValueError, TypeError, KeyError):
            asked = None
        if not isinstance(asked, str) or not asked.strip():
            raise CalibrationError(
                f'{path}, line {number} must be {{"question": "...", "answers": [...]}}: {line[:160]!r}'
            )
        found.append({name: record[name] for name in ("question", "answers", "answer") if name in record})
    return found


def _found(engine: Asks, case: str | Mapping[str, Any], find: Find) -> Trial:
    said = {"question": case} if isinstance(case, str) else case
    question = said.get("question")
    if not isinstance(question, str) or not question.strip() or any(field in said for field in _PASSAGES):
        raise ArgumentTypeError(f"{_MUST}; got {case!r:.80}")
    return Trial(engine, question, _answers(said.get("answers") or said.get("answer")), lambda: find(question))


def _chunks(engine: Asks, given: Sequence[Any]) -> list[Chunk]:
    return [chunk if isinstance(chunk, Chunk) else engine.documents.passage(chunk) for chunk in given]


def _answers(given: Any) -> tuple[str, ...]:
    """One answer, or several."""
    from ragkv.evaluation.formats import texts_of

    try:
        return texts_of(list(given) if listable(given) else given)
    except TypeError as error:
        raise ArgumentTypeError(f"{_MUST}; got the answers {given!r:.80}") from error
