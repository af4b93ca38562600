"""A folder's passages for Haystack."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import Any, cast

from haystack import Document, component, default_from_dict, default_to_dict

from ragkv.adapters.haystack.documents import document_of, fitting
from ragkv.adapters.haystack.folder import Folder, OverFolder, json_can_hold
from ragkv.errors import ArgumentError, instance
from ragkv.rag import RAG
from ragkv.retrieval import Retrieval
from ragkv.streaming import in_thread


@component
class RagKVRetriever(OverFolder):
    """Finds passages of a folder of ragkv, as a Haystack component.

    Documents come in the order of the prompt: those of one source together, in their own order. Each carries a reference by
    which :class:`RagKVGenerator` finds its KV.
    """

    def __init__(
        self,
        rag: RAG | str | os.PathLike[str],
        top_k: int | None = None,
        neighbours: int = 0,
        filters: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        **retrieval: Any,
    ):
        """Nothing is loaded yet.

        Args:
            rag: path of a folder, opened by :meth:`warm_up` or the first call, once for all components of the process; or a RAG.
            top_k: passages to find; 5 by default, or as many as ``max_context_tokens`` takes.
            neighbours: passages to take along on either side of each, see :meth:`ragkv.RAG.retrieve`.
            filters: Haystack's, over ``meta``; those of a call take their place.
            options: of :meth:`ragkv.RAG.from_pretrained`, for a path.
            **retrieval: more of :class:`ragkv.Retrieval`: ``hybrid``, ``hops``, ``where``, ...

        Raises:
            UnknownArgumentError: there is no such option of retrieval.
            RetrievalError, ArgumentTypeError: one is out of range, or of another type.
        """
        instance("rag", rag, RAG | str | os.PathLike, "the path of a folder, or a ragkv.RAG")
        self.retrieval: dict[str, Any] = {"top_k": top_k, "neighbours": neighbours, **retrieval}
        Retrieval.of(**self.retrieval)
        self.filters = filters
        self._folder = Folder(rag, options)

    def to_dict(self) -> dict[str, Any]:
        """As a pipeline's file holds it.

        Raises:
            ArgumentError: it was given a RAG and not a path, or an option of retrieval is an object or a function.
        """
        for name, value in self.retrieval.items():
            if not json_can_hold(value):
                raise ArgumentError(
                    f"{name}= cannot be written into a file: give what JSON can hold, got {value!r:.80}"
                )
        return default_to_dict(self, **self._folder.to_dict(), filters=self.filters, **self.retrieval)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RagKVRetriever:
        """The component of :meth:`to_dict`."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
        retrieval: dict[str, Any] | None = None,
    ) -> dict[str, list[Document]]:
        """Find passages.

        Args:
            query: not blank.
            filters: instead of the component's.
            top_k: instead of the component's.
            retrieval: more of :class:`ragkv.Retrieval`, each instead of the component's.

        Raises:
            RetrievalError: a blank query, or an option is out of range.
            FilterError: filters that Haystack does not know.
            ArgumentError: filters that are not on ``meta``.
        """
        instance("retrieval", retrieval, dict | None, "a dict of options of ragkv.Retrieval")
        asked = {**self.retrieval, **(retrieval or {}), **({} if top_k is None else {"top_k": top_k})}
        chosen = self.filters if filters is None else filters
        if chosen:
            asked["where"] = {"$and": [fitting(chosen), asked.get("where") or {}]}
        return {"documents": list(map(document_of, self._rag().retrieve(query, **asked)))}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        filters: dict[str, Any] | None = None,
        top_k: int | None = None,
        retrieval: dict[str, Any] | None = None,
    ) -> dict[str, list[Document]]:
        """:meth:`run` in an event loop, which goes on meanwhile."""
        rag = await asyncio.to_thread(self._rag)
        return await in_thread(rag.threads.pool(), partial(self.run, query, filters, top_k, retrieval))

    def _rag(self) -> RAG:
        return cast(RAG, self._folder.open())
