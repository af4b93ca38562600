"""What adapters share besides passages: how they search, answer in an event loop, and count. Knows no framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ragkv.engine import Engine
from ragkv.rag import RAG
from ragkv.report import AnswerReport
from ragkv.retrieval import Document, Hit
from ragkv.streaming import Threads


def threads_of(rag: RAG | Engine) -> Threads:
    """Threads to answer in: those of a RAG, which waits for them when it is closed; some for an engine."""
    return rag.threads if isinstance(rag, RAG) else Threads()


def search(
    rag: RAG, question: str, top_k: int, wanted: Callable[[Hit], bool] | None = None, neighbours: int = 0
) -> list[Hit]:
    """The passages nearest to a question, best first, of those that are wanted; their neighbours behind them.

    Args:
        rag: whose documents are searched.
        question: not blank.
        top_k: how many, at least 1; fewer where there are fewer.
        wanted: whether a passage is; all by default. More and more are looked through, until there are enough.
        neighbours: passages to take along on either side of each, if they are wanted too.

    Raises:
        RetrievalError: a blank question, or ``top_k`` below 1.
    """
    options: dict[str, Any] = {"neighbours": neighbours, "namespace": rag.engine.documents.namespace}
    hits = rag.retriever.search(question, top_k, **options)
    if wanted is None:
        return hits
    look, there = top_k, len(rag.retriever.index.ids())
    while len(found := [hit for hit in hits[:look] if wanted(hit)]) < top_k and look < there:
        look *= 4
        hits = rag.retriever.search(question, look, **options)
    del found[top_k:]
    chosen = {hit.passage_id for hit in found}
    beside = {(hit.document_id, hit.position + by) for hit in found for by in range(-neighbours, neighbours + 1)}
    more = [hit for hit in hits if (hit.document_id, hit.position) in beside and hit.passage_id not in chosen]
    return found + [hit for hit in more if wanted(hit)]


def prompt_order(hits: list[Hit]) -> list[Hit]:
    """Passages, best first, in the order of the prompt: documents by their best one, each in its own order."""
    rank = {hit.document_id: number for number, hit in reversed(list(enumerate(hits)))}
    return sorted(hits, key=lambda hit: (rank[hit.document_id], hit.position))


def listed(rag: RAG) -> list[Document]:
    """All documents of a RAG's namespace, as the catalogue has them."""
    return rag.retriever.catalogue.documents(rag.engine.documents.namespace)


def document(rag: RAG, source: str) -> Document | None:
    """The document of a source in a RAG's namespace; None where there is none."""
    return rag.retriever.catalogue.get(source, rag.engine.documents.namespace)


def model_name(engine: Engine) -> str:
    """What the engine's model is called."""
    return getattr(engine.model.config, "name_or_path", "") or type(engine.model).__name__


def usage(report: AnswerReport | None) -> dict[str, Any]:
    """Tokens of prompt and answer, by the names that frameworks know."""
    if report is None:
        return {}
    fusion, answer = report.fusion, report.new_tokens
    prompt = fusion.prefix_tokens + fusion.chunk_tokens + fusion.suffix_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
