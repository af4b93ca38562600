"""The chain: a question in; the documents that were found, and the answer over their stored KV, out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, closing
from functools import partial
from typing import Any

from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableConfig, RunnableGenerator
from langchain_core.runnables.utils import AddableDict

from ragkv.adapters.langchain.documents import passages_of
from ragkv.adapters.langchain.retriever import RagKVRetriever
from ragkv.adapters.parts import check, split, streamed, threads_of
from ragkv.adapters.passages import HandedOver, all_of, documents_of, engine_of, hand_over
from ragkv.engine import Engine
from ragkv.errors import ArgumentError, ArgumentTypeError, instance, no_question
from ragkv.rag import RAG
from ragkv.report import AnswerReport
from ragkv.streaming import Threads, in_thread


def create_ragkv_chain(
    retriever: Runnable[str, list[Document]], rag: RAG | Engine, **options: Any
) -> Runnable[str | dict[str, Any], dict[str, Any]]:
    """A chain that answers a question over what a retriever finds; documents reach the model as documents.

    It takes a question, or a dict with one under ``"question"``, and gives a dict: ``"question"``; ``"context"``, the documents
    that the model was given, in the order of the prompt; ``"answer"``; and ``"report"``, what it cost
    (:meth:`ragkv.report.AnswerReport.as_dict`). ``stream()`` gives the parts as they come, the answer piece by piece. Whoever
    stops listening stops the model.

    Documents of :class:`RagKVRetriever` and :class:`RagKVVectorStore` over the same folder are its stored chunks. Those of any
    other retriever are read on the way, each alone, and kept in the store: the next question finds them. One without text, or
    too long for the model, is left out with a warning.

    Args:
        retriever: any retriever of LangChain, or a runnable that gives documents for a question.
        rag: what answers. Whoever made it closes it.
        **options: what :meth:`ragkv.Engine.stream` takes: ``method``, ``stop``, ``max_new_tokens``, ...; for a
            :class:`RagKVRetriever` also ``k`` and those of :class:`ragkv.Retrieval` but ``top_k``, which is sampling's. A
            call's own arguments override them: ``chain.invoke(question, max_new_tokens=8, hops=2)``.

    Raises:
        ArgumentError: options of retrieval, and the retriever is no :class:`RagKVRetriever`.
        ArgumentTypeError: ``retriever`` is no runnable, or ``rag`` neither of the two. When it runs: the question is no text, or
            the retriever gives no list.
        PromptError: when it runs: none of the documents can be given to the model; and as :meth:`ragkv.Engine.stream`.
    """
    instance("retriever", retriever, Runnable, "a retriever of LangChain, or a runnable that gives documents")
    steps: Any = _Steps(retriever, engine_of(rag), threads_of(rag), options)
    return RunnableGenerator(steps.answer, steps.aanswer, name="ragkv_chain")


class _Steps:
    """From the question to the parts of the result, in turn."""

    def __init__(
        self, retriever: Runnable[str, list[Document]], engine: Engine, threads: Threads, options: dict[str, Any]
    ):
        self._retriever, self._engine, self._threads, self._options = retriever, engine, threads, options
        self._both(options)

    def answer(
        self, inputs: Iterator[str | dict[str, Any]], config: RunnableConfig, **call: Any
    ) -> Iterator[AddableDict]:
        """See :func:`create_ragkv_chain`."""
        question = _question(list(inputs))
        yield AddableDict(question=question)
        retrieval, options = self._both({**self._options, **call})
        check(self._engine, question, options)
        handed, given = self._handed(self._retriever.invoke(question, config, **retrieval), options)
        yield AddableDict(context=given)
        with closing(self._engine.stream(handed.chunks, question, **options)) as pieces:
            for piece in pieces:
                yield AddableDict(answer=piece)
        yield _end(pieces.report)

    async def aanswer(
        self, inputs: AsyncIterator[str | dict[str, Any]], config: RunnableConfig, **call: Any
    ) -> AsyncIterator[AddableDict]:
        """See :func:`create_ragkv_chain`."""
        question = _question([part async for part in inputs])
        yield AddableDict(question=question)
        retrieval, options = self._both({**self._options, **call})
        pool = self._threads.pool()
        await in_thread(pool, partial(check, self._engine, question, options))
        documents = await self._retriever.ainvoke(question, config, **retrieval)
        handed, given = await in_thread(pool, partial(self._handed, documents, options))
        yield AddableDict(context=given)
        async with aclosing(streamed(self._engine, handed.chunks, question, pool, options)) as pieces:
            async for piece in pieces:
                yield AddableDict(answer=piece)
        yield _end(pieces.report)

    def _both(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The retriever's options, and the engine's."""
        sampling = {name: options[name] for name in ("top_k",) if name in options}
        retrieval, generation = split({name: value for name, value in options.items() if name not in sampling})
        if "k" in generation:
            retrieval["k"] = generation.pop("k")
        if retrieval and not isinstance(self._retriever, RagKVRetriever):
            raise ArgumentError(
                f"{', '.join(sorted(retrieval))}: only a RagKVRetriever takes options of ragkv.Retrieval"
            )
        return retrieval, generation | sampling

    def _handed(self, documents: Any, options: Mapping[str, Any]) -> tuple[HandedOver, list[Document]]:
        """What a retriever found, handed over, and what of it the model is given."""
        found = all_of(documents, object, "a retriever must give a list of documents")
        where = documents_of(self._engine, options)
        passages = passages_of(found, self._engine, where.namespace)
        handed = hand_over(self._engine, passages, where)
        return handed, [found[number] for number in handed.numbers]


def _question(parts: list[Any]) -> str:
    """The question of an input, which what stands in front of the chain may give in parts: joined as LangChain joins them."""
    given = parts[0] if parts else None
    for part in parts[1:]:
        try:
            given = given + part
        except TypeError:
            given = part
    question = given.get("question") if isinstance(given, Mapping) else given
    if not isinstance(question, str) or not question.strip():
        raise ArgumentTypeError(f"give a question, or a dict with one under 'question': {no_question(question)}")
    return question


def _end(report: AnswerReport | None) -> AddableDict:
    """The last part; the answer's text is empty, so that there is one where the model said nothing."""
    return AddableDict(answer="", report=None if report is None else report.as_dict())
