"""What adapters share besides passages: how they search, answer in an event loop, and count. Knows no framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from itertools import accumulate
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from ragkv.answering import AnswerStream
from ragkv.chunk import Chunk
from ragkv.engine import Engine
from ragkv.errors import DocumentError
from ragkv.forks import ForkedLock
from ragkv.messages import Question
from ragkv.model.generation import Settings
from ragkv.rag import RAG
from ragkv.report import AnswerReport
from ragkv.request import Request, scheduling
from ragkv.retrieval import Catalogue, Change, Document, Hit, Retrieval, TokenChunker
from ragkv.streaming import AsyncAnswerStream, Threads

_of_engines: WeakKeyDictionary[Engine, Threads] = WeakKeyDictionary()
_changing: WeakKeyDictionary[Catalogue, ForkedLock] = WeakKeyDictionary()
_BETWEEN = "\n\n"


def threads_of(rag: RAG | Engine) -> Threads:
    """Threads to answer in: those of a RAG, which waits for them when it is closed; one set for all adapters over an engine."""
    if isinstance(rag, RAG):
        return rag.threads
    return _of_engines.setdefault(rag, Threads())


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of :class:`ragkv.Retrieval` among others, checked, and the others.

    Raises:
        RetrievalError, ArgumentTypeError: one is out of range, or of another type.
    """
    _, others = Retrieval.split(options)
    return {name: value for name, value in options.items() if name not in others}, others


def search(rag: RAG, question: str, top_k: int, wanted: Callable[[Hit], bool] | None = None) -> list[Hit]:
    """The passages nearest to a question, best first, of those that are wanted.

    Args:
        rag: whose documents are searched.
        question: not blank.
        top_k: how many, at least 1; fewer where there are fewer.
        wanted: whether a passage is; all by default. More and more are looked through, until there are enough.

    Raises:
        RetrievalError: a blank question, or ``top_k`` below 1.
    """
    namespace = rag.engine.documents.namespace
    hits = rag.retriever.search(question, top_k, namespace=namespace)
    if wanted is None:
        return hits
    look, there = top_k, len(rag.retriever.index.ids())
    while len(found := list(filter(wanted, hits))) < top_k and look < there:
        look *= 4
        hits = rag.retriever.search(question, look, namespace=namespace)
    return found[:top_k]


class Cut(TokenChunker):
    """Makes texts of passages, and cuts them where those end; any other text is one passage, as it is.

    Args:
        documents: the passages of each, by its source.

    Attributes:
        texts: by source; what they begin with tells where their passages stand, so that no two are the same.
    """

    def __init__(self, documents: Mapping[str, Sequence[str]]):
        self.texts: dict[str, str] = {}
        self._spans: dict[str, list[tuple[int, int]]] = {}
        for source, passages in documents.items():
            head = f"{source} {' '.join(str(len(passage)) for passage in passages)}"
            ends = accumulate(len(part) + len(_BETWEEN) for part in [head, *passages])
            text = self.texts[source] = _BETWEEN.join([head, *passages])
            self._spans[text] = [(start, start + len(passage)) for start, passage in zip(ends, passages, strict=False)]

    @property
    def settings(self) -> str:
        """That a text says itself where it is cut."""
        return "whole"

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the passages of a text stand."""
        return self._spans.get(text, [(0, len(text))])


def changing(catalogue: Catalogue) -> RLock:
    """What all adapters over a folder hold from looking at its documents to changing them.

    It comes before any snapshot: whoever waited for it in one would hold up a fork.
    """
    return _changing.setdefault(catalogue, ForkedLock()).held


def listed(rag: RAG) -> list[Document]:
    """All documents of a RAG's namespace, as the catalogue has them."""
    return rag.retriever.catalogue.documents(rag.engine.documents.namespace)


def document(rag: RAG, source: str) -> Document | None:
    """The document of a source in a RAG's namespace; None where there is none."""
    return rag.retriever.catalogue.get(source, rag.engine.documents.namespace)


def remove(rag: RAG, source: str) -> Change | None:
    """Remove the document of a source from a RAG's namespace; what changed, and None where it is not there."""
    if document(rag, source) is not None:
        with suppress(DocumentError):  # somebody else has removed it
            return rag.remove(source)
    return None


def check(engine: Engine, question: str, options: Mapping[str, Any]) -> None:
    """Look at a question and its options before its passages are looked for, as :meth:`ragkv.RAG.ask` does.

    Args:
        engine: answers.
        question: with nothing in front of it.
        options: of :meth:`ragkv.Engine.generate`.

    Raises:
        As :meth:`ragkv.Engine.generate`, as far as it hangs on no passage; PromptTooLongError: the question is too long by itself.
    """
    generation = dict(options)
    method, _ = generation.pop("method", None), generation.pop("stop", ())
    named: dict[str, Any] = {
        name: generation.pop(name) for name in ("system", "namespace", "slots", "past") if name in generation
    }
    named |= {"keep": generation.pop("keep_past", False), **scheduling(generation)}
    request = Request((), question, engine.method_of(method), **named)
    settings = Settings(engine.documents.steps.decoder, engine.tokenizer, generation)
    engine.prompting.check(request, question, settings.asked)


def streamed(
    engine: Engine, chunks: list[Chunk], question: Question, executor: Executor, options: dict[str, Any]
) -> AsyncAnswerStream[Hit]:
    """:meth:`ragkv.Engine.stream` in an event loop, which goes on meanwhile."""

    def start(**more: Any) -> tuple[list[Hit], AnswerStream]:
        return [], engine.stream(chunks, question, **more)

    return AsyncAnswerStream(start, executor, **options)


def model_name(engine: Engine) -> str:
    """What the engine's model is called."""
    return getattr(engine.model.config, "name_or_path", "") or type(engine.model).__name__


def prompt_tokens(report: AnswerReport) -> int:
    """Tokens of the prompt."""
    fusion = report.fusion
    return fusion.prefix_tokens + fusion.chunk_tokens + fusion.suffix_tokens


def usage(report: AnswerReport | None) -> dict[str, Any]:
    """Tokens of prompt and answer, by the names that frameworks know."""
    if report is None:
        return {}
    prompt, answer = prompt_tokens(report), report.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
