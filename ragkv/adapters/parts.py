"""What adapters share besides passages: how they search, answer in an event loop, and count. Knows no framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ragkv.engine import Engine
from ragkv.rag import RAG
from ragkv.report import AnswerReport
from ragkv.retrieval import Hit
from ragkv.streaming import Threads


def threads_of(rag: RAG | Engine) -> Threads:
    """Threads to answer in: those of a RAG, which waits for them when it is closed; some for an engine."""
    return rag.threads if isinstance(rag, RAG) else Threads()


def search(rag: RAG, question: str, top_k: int, wanted: Callable[[Hit], bool] | None = None) -> list[Hit]:
    """The passages nearest to a question, best first, of those that are wanted.

    Args:
        rag: whose documents are searched.
        question: not blank.
        top_k: how many, at least 1; fewer where there are fewer.
        wanted: whether a passage is; all by default. Asked for more and more of them, until there are enough.

    Raises:
        RetrievalError: a blank question, or ``top_k`` below 1.
    """
    hits = rag.retriever.search(question, top_k)
    if wanted is None:
        return hits
    asked = top_k
    while len(found := [hit for hit in hits if wanted(hit)]) < top_k and len(hits) == asked:
        asked *= 4
        hits = rag.retriever.search(question, asked)
    return found[:top_k]


def usage(report: AnswerReport | None) -> dict[str, Any]:
    """Tokens of prompt and answer, by the names that frameworks know."""
    if report is None:
        return {}
    fusion, answer = report.fusion, report.new_tokens
    prompt = fusion.prefix_tokens + fusion.chunk_tokens + fusion.suffix_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
