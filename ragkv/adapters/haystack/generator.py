"""Answers over Haystack's documents from stored KV."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from contextlib import aclosing, closing
from functools import partial
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.dataclasses import ComponentInfo, StreamingCallbackT, StreamingChunk, select_streaming_callback
from haystack.utils import deserialize_callable, serialize_callable

from ragkv.adapters.haystack.documents import passage_of
from ragkv.adapters.haystack.folder import Folder, OverFolder
from ragkv.adapters.parts import model_name, streamed, threads_of, usage
from ragkv.adapters.passages import HandedOver, all_of, documents_of, engine_of, hand_over
from ragkv.engine import Engine
from ragkv.errors import ArgumentTypeError, instance, no_question
from ragkv.rag import RAG
from ragkv.report import AnswerReport
from ragkv.streaming import in_thread, stoppable

logger: logging.Logger = logging.getLogger(__name__)


@component
class RagKVGenerator(OverFolder):
    """Answers a question over documents, as a Haystack component: they stay apart, each placed from its KV.

    Documents of a :class:`RagKVRetriever` have theirs, in the context of the document that they are of. The text of any other is
    read on the way, and kept in the store. What has no text, or is too long for the model, is left out with a warning.
    """

    def __init__(
        self,
        rag: RAG | Engine | str | os.PathLike[str],
        generation_kwargs: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
        options: dict[str, Any] | None = None,
    ):
        """Nothing is loaded yet.

        Args:
            rag: path of a folder, opened by :meth:`warm_up` or the first call, once for all components of the process; or a RAG or
                an engine, with a tokenizer.
            generation_kwargs: what ``model.generate`` takes, and ``method`` and ``stop``.
            streaming_callback: called with each piece of the answer.
            options: of :meth:`ragkv.RAG.from_pretrained`, for a path.
        """
        self.generation_kwargs: dict[str, Any] = _options(generation_kwargs)
        self.streaming_callback: StreamingCallbackT | None = streaming_callback
        self._folder = Folder(rag, options)

    def to_dict(self) -> dict[str, Any]:
        """As a pipeline's file holds it.

        Raises:
            ArgumentError: it was given an object and not a path.
        """
        callback = self.streaming_callback and serialize_callable(self.streaming_callback)
        more = {"generation_kwargs": self.generation_kwargs, "streaming_callback": callback}
        return default_to_dict(self, **self._folder.to_dict(), **more)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RagKVGenerator:
        """The component of :meth:`to_dict`."""
        given = dict(data.get("init_parameters", {}))
        if given.get("streaming_callback"):
            given["streaming_callback"] = deserialize_callable(given["streaming_callback"])
        return default_from_dict(cls, {**data, "init_parameters": given})

    @component.output_types(replies=list[str], meta=list[dict[str, Any]], documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        generation_kwargs: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
    ) -> dict[str, Any]:
        """Answer a question.

        Args:
            query: not blank.
            documents: in the order of the prompt. Where there are none, there is no reply, and a warning.
            generation_kwargs: besides the component's, and before them.
            streaming_callback: instead of the component's.

        Returns:
            ``replies``: the answer; ``meta``: its ``model``, ``usage``, ``report`` and what was ``left_out``, the reason by the
            document's id; ``documents``: those that the model was given.

        Raises:
            PromptError: none of the documents can be given to the model; and as :meth:`ragkv.Engine.generate`.
            ArgumentTypeError: the query is no text or blank, or the documents are none.
        """
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=False)
        documents = _asked(query, documents)
        if not documents:
            return _nothing()
        options = {**self.generation_kwargs, **_options(generation_kwargs)}
        engine = engine_of(self._folder.open())
        handed = hand_over(engine, map(passage_of, documents), documents_of(engine, options))
        if callback is None:
            answer = engine.generate(handed.chunks, query, **options)
            return _said(engine, answer.text, answer.report, documents, handed)
        text = ""
        with closing(engine.stream(handed.chunks, query, **options)) as stream:
            for piece in stream:
                callback(self._piece(piece, start=not text))
                text += piece
        return _said(engine, text, stream.report, documents, handed)

    @component.output_types(replies=list[str], meta=list[dict[str, Any]], documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        generation_kwargs: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
    ) -> dict[str, Any]:
        """:meth:`run` in an event loop, which goes on meanwhile. When the task is cancelled, the model stops."""
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=True)
        documents = _asked(query, documents)
        if not documents:
            return _nothing()
        options = {**self.generation_kwargs, **_options(generation_kwargs)}
        opened = await asyncio.to_thread(self._folder.open)
        engine, pool = engine_of(opened), threads_of(opened).pool()
        handed = await in_thread(
            pool, lambda: hand_over(engine, map(passage_of, documents), documents_of(engine, options))
        )
        if callback is None:
            answer = await stoppable(pool, partial(engine.generate, handed.chunks, query), **options)
            return _said(engine, answer.text, answer.report, documents, handed)
        text, stream = "", streamed(engine, handed.chunks, query, pool, options)
        async with aclosing(stream):
            async for piece in stream:
                waited: Any = callback(self._piece(piece, start=not text))
                if inspect.isawaitable(waited):
                    await waited
                text += piece
        return _said(engine, text, stream.report, documents, handed)

    def _piece(self, text: str, start: bool) -> StreamingChunk:
        return StreamingChunk(content=text, index=0, start=start, component_info=ComponentInfo.from_component(self))


def _options(generation_kwargs: Any) -> dict[str, Any]:
    instance("generation_kwargs", generation_kwargs, dict | None, "a dict of what model.generate takes")
    return dict(generation_kwargs or {})


def _asked(query: Any, documents: Any) -> list[Document]:
    """The documents of a question that is one."""
    if not isinstance(query, str) or not query.strip():
        raise ArgumentTypeError(no_question(query))
    return all_of([] if documents is None else documents, Document, "documents must be a list of Haystack's documents")


def _nothing() -> dict[str, Any]:
    logger.warning("nothing is answered: there are no documents")
    return {"replies": [], "meta": [], "documents": []}


def _said(
    engine: Engine, text: str, report: AnswerReport | None, documents: list[Document], handed: HandedOver
) -> dict[str, Any]:
    meta = {
        "model": model_name(engine),
        "usage": usage(report),
        "report": report and report.as_dict(),
        "left_out": {documents[number].id: reason for number, reason in handed.left_out.items()},
    }
    return {"replies": [text], "meta": [meta], "documents": [documents[number] for number in handed.numbers]}
