"""A folder's passages for Haystack."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import Any, cast

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils.filters import document_matches_filter

from ragkv.adapters.haystack.documents import document_of
from ragkv.adapters.haystack.folder import Folder
from ragkv.adapters.parts import prompt_order, search
from ragkv.errors import instance
from ragkv.rag import RAG
from ragkv.retrieval import Hit
from ragkv.streaming import in_thread


@component
class RagKVRetriever:
    """Finds passages of a folder of ragkv, as a Haystack component.

    Documents come in the order of the prompt: those of one source together, in their own order. Each carries a reference by
    which :class:`RagKVGenerator` finds its KV.
    """

    def __init__(
        self,
        rag: RAG | str | os.PathLike[str],
        top_k: int = 5,
        neighbours: int = 0,
        filters: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ):
        """Nothing is loaded yet.

        Args:
            rag: path of a folder, opened by :meth:`warm_up` or the first call, once for all components of the process; or a RAG.
            top_k: passages to find.
            neighbours: passages to take along on either side of each, see :meth:`ragkv.RAG.retrieve`.
            filters: Haystack's, over ``meta``; those of a call take their place.
            options: of :meth:`ragkv.RAG.from_pretrained`, for a path.
        """
        instance("rag", rag, RAG | str | os.PathLike, "the path of a folder, or a ragkv.RAG")
        self.top_k, self.neighbours, self.filters = top_k, neighbours, filters
        self._folder = Folder(rag, options)

    def to_dict(self) -> dict[str, Any]:
        """As a pipeline's file holds it.

        Raises:
            ArgumentError: it was given a RAG and not a path.
        """
        more = {"top_k": self.top_k, "neighbours": self.neighbours, "filters": self.filters}
        return default_to_dict(self, **self._folder.to_dict(), **more)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RagKVRetriever:
        """The component of :meth:`to_dict`."""
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """Open the folder, if it is not open yet."""
        self._folder.open()

    async def warm_up_async(self) -> None:
        """:meth:`warm_up` in an event loop, which goes on meanwhile."""
        await asyncio.to_thread(self.warm_up)

    def close(self) -> None:
        """Close the folder, when no other component needs it."""
        self._folder.close()

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Find passages.

        Args:
            query: not blank.
            filters: instead of the component's.
            top_k: instead of the component's.

        Raises:
            RetrievalError: a blank query, or ``top_k`` below 1.
            FilterError: filters that Haystack does not know.
        """
        chosen = (self.filters if filters is None else filters) or {}

        def wanted(hit: Hit) -> bool:
            return document_matches_filter(chosen, document_of(hit))

        at_most = self.top_k if top_k is None else top_k
        hits = search(self._rag(), query, at_most, wanted if chosen else None, self.neighbours)
        return {"documents": [document_of(hit) for hit in prompt_order(hits)]}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """:meth:`run` in an event loop, which goes on meanwhile."""
        rag = await asyncio.to_thread(self._rag)
        return await in_thread(rag.threads.pool(), partial(self.run, query, filters, top_k))

    def _rag(self) -> RAG:
        return cast(RAG, self._folder.open())
