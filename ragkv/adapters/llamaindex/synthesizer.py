"""Answers over LlamaIndex's nodes from stored KV."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.indices.prompt_helper import ChatPromptHelper, PromptHelper
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.query_engine.retriever_query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers.base import BaseSynthesizer, QueryTextType
from llama_index.core.schema import NodeWithScore, QueryBundle

from ragkv.adapters.llamaindex.llm import RagKVLLM
from ragkv.adapters.llamaindex.nodes import passage_of
from ragkv.adapters.llamaindex.retriever import RagKVRetriever
from ragkv.adapters.parts import check, split, streamed, threads_of
from ragkv.adapters.passages import REFERENCE, Passage, all_of, documents_of, engine_of, hand_over
from ragkv.answering import AnswerStream
from ragkv.chunk import Chunk
from ragkv.engine import Engine
from ragkv.errors import ArgumentError
from ragkv.rag import RAG
from ragkv.retrieval import Hit
from ragkv.streaming import AsyncAnswerStream, in_thread, stoppable


class RagKVSynthesizer(BaseSynthesizer):
    """Answers over nodes of any retriever, as a LlamaIndex ``BaseSynthesizer``: nodes stay apart, each placed from its KV.

    Nodes of a :class:`RagKVRetriever` or a :class:`RagKVVectorStore` have theirs, in the context of their document. What the
    model is shown of any other (its text, and the metadata that are not excluded) is read on the way, and kept in the store. Nodes
    without text, or too long for the model, are left out with a warning, and are no ``source_nodes`` of the response. Its
    ``metadata["ragkv"]`` has the ``report`` of the answer, when it is there, and ``left_out``, the reason by node id.

    Args:
        rag: or an engine, with a tokenizer. Only a RAG's folder knows the context of its nodes.
        streaming: answer piece by piece.
        empty_response: the answer where no nodes were found.
        callback_manager: LlamaIndex's.
        **generation: what ``model.generate`` takes, and ``method`` and ``stop``; a call of ``synthesize`` may say otherwise.

    Raises:
        PromptError: from an answer: none of the nodes can be given to the model.
        ArgumentTypeError: from an answer: they are none.
    """

    def __init__(
        self,
        rag: RAG | Engine,
        *,
        streaming: bool = False,
        empty_response: str | None = None,
        callback_manager: CallbackManager | None = None,
        **generation: Any,
    ):
        self.generation: dict[str, Any] = generation
        self._engine, self._threads = engine_of(rag), threads_of(rag)
        llm, ids = RagKVLLM(rag, generation), self._engine.encoder.ids
        super().__init__(
            llm=llm,
            callback_manager=callback_manager,
            prompt_helper=PromptHelper.from_llm_metadata(llm.metadata, tokenizer=lambda text: list(ids(text))),
            chat_prompt_helper=ChatPromptHelper.from_llm_metadata(llm.metadata, tokenizer=lambda text: list(ids(text))),
            streaming=streaming,
            empty_response=empty_response,
        )

    def synthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **generation: Any,
    ) -> RESPONSE_TYPE:
        """The answer to a question over nodes, in their order."""
        used, given = self._given(nodes, **generation)
        return _said(super().synthesize(query, used, additional_source_nodes, **given, **generation), given)

    async def asynthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **generation: Any,
    ) -> RESPONSE_TYPE:
        """:meth:`synthesize` in an event loop, which goes on meanwhile."""
        used, given = await in_thread(self._threads.pool(), partial(self._given, nodes, **generation))
        return _said(await super().asynthesize(query, used, additional_source_nodes, **given, **generation), given)

    def get_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        *,
        chunks: list[Chunk] | None = None,
        facts: dict[str, Any] | None = None,
        **generation: Any,
    ) -> str | Generator[str, None, None]:
        """The answer over texts, or over the chunks of nodes."""
        placed = hand_over(self._engine, map(Passage, text_chunks)).chunks if chunks is None else chunks
        options, said = {**self.generation, **generation}, {} if facts is None else facts
        if self._streaming:
            return _pieces(self._engine.stream(placed, query_str, **options), said)
        answer = self._engine.generate(placed, query_str, **options)
        said["report"] = answer.report.as_dict()
        return answer.text

    async def aget_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        *,
        chunks: list[Chunk] | None = None,
        facts: dict[str, Any] | None = None,
        **generation: Any,
    ) -> str | AsyncGenerator[str, None]:
        """:meth:`get_response` in an event loop; a task that is cancelled, or a stream that is closed, stops the model."""
        pool, texts = self._threads.pool(), list(text_chunks)
        if chunks is None:
            chunks = (await in_thread(pool, lambda: hand_over(self._engine, map(Passage, texts)))).chunks
        options, said = {**self.generation, **generation}, {} if facts is None else facts
        if self._streaming:
            return _async_pieces(streamed(self._engine, chunks, query_str, pool, options), said)
        answer = await stoppable(pool, partial(self._engine.generate, chunks, query_str), **options)
        said["report"] = answer.report.as_dict()
        return answer.text

    def _given(self, nodes: list[NodeWithScore], **generation: Any) -> tuple[list[NodeWithScore], dict[str, Any]]:
        """The nodes that the model is given, and their chunks; with room for what there is to say of the answer."""
        nodes = all_of(nodes, NodeWithScore, "nodes must be a list of NodeWithScore")
        where = documents_of(self._engine, {**self.generation, **generation})
        handed = hand_over(self._engine, map(passage_of, nodes), where)
        left_out = {nodes[number].node.node_id: reason for number, reason in handed.left_out.items()}
        used = [nodes[number] for number in handed.numbers]
        return used, {"chunks": handed.chunks, "facts": {"left_out": left_out, "report": None}}

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        if prompts:
            raise ArgumentError(f"{', '.join(prompts)}: the prompt is the engine's own: ragkv.Engine(template=...)")


class RagKVQueryEngine(RetrieverQueryEngine):
    """Answers over the documents of a :class:`~ragkv.RAG`: its retriever and synthesizer as one LlamaIndex query engine.

    Args:
        rag: finds and answers.
        top_k, neighbours: see :class:`RagKVRetriever`.
        streaming: answer piece by piece.
        node_postprocessors: LlamaIndex's, between finding and answering.
        callback_manager: LlamaIndex's.
        **options: more of :class:`ragkv.Retrieval`, and what :class:`RagKVSynthesizer` takes.
    """

    def __init__(
        self,
        rag: RAG,
        top_k: int | None = None,
        neighbours: int = 0,
        *,
        streaming: bool = False,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ):
        retrieval, generation = split(options)
        answers = RagKVSynthesizer(rag, streaming=streaming, callback_manager=callback_manager, **generation)
        super().__init__(
            RagKVRetriever(rag, top_k, neighbours, callback_manager=callback_manager, **retrieval),
            answers,
            node_postprocessors,
            callback_manager,
        )
        self._rag, self._answers = rag, answers

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        check(self._rag.engine, query_bundle.query_str, self._answers.generation)
        return super()._query(query_bundle)

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        look = partial(check, self._rag.engine, query_bundle.query_str, self._answers.generation)
        await in_thread(self._rag.threads.pool(), look)
        return await super()._aquery(query_bundle)


def _pieces(stream: AnswerStream, facts: dict[str, Any]) -> Generator[str, None, None]:
    yield from stream
    facts["report"] = stream.report and stream.report.as_dict()


async def _async_pieces(stream: AsyncAnswerStream[Hit], facts: dict[str, Any]) -> AsyncGenerator[str, None]:
    async with aclosing(stream):
        async for piece in stream:
            yield piece
    facts["report"] = stream.report and stream.report.as_dict()


def _said(response: RESPONSE_TYPE, given: dict[str, Any]) -> RESPONSE_TYPE:
    """The response, with what there is to say of it, now or when it is there."""
    if response.metadata is not None:  # it has none where there were no nodes
        response.metadata[REFERENCE] = given["facts"]
    return response
