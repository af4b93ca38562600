"""Ordering candidates by a model that reads question and passage together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ragkv.errors import MissingPackageError, RetrievalError, first_line


@runtime_checkable
class Predicts(Protocol):
    """Scores pairs, as ``sentence_transformers.CrossEncoder`` does."""

    def predict(self, sentences: list[tuple[str, str]]) -> Any:
        """A score for each pair of question and text."""
        ...


@runtime_checkable
class Ranks(Protocol):
    """Orders texts, as ``sentence_transformers.CrossEncoder`` does."""

    def rank(self, query: str, documents: list[str]) -> Any:
        """For each text a mapping of ``corpus_id``, its number, and ``score``."""
        ...


Reranker = Predicts | Ranks


def scores(reranker: Any, question: str, texts: Sequence[str]) -> list[float]:
    """What a reranker says of each text; the higher the better.

    Args:
        reranker: see :class:`~ragkv.retrieval.Retrieval`.
        question: as it was asked.
        texts: the n candidates.

    Raises:
        RetrievalError: it gave something else than a finite number a text, or cannot be loaded.
        MissingPackageError: sentence-transformers is not installed.
    """
    if isinstance(reranker, str | os.PathLike):
        reranker = _loaded(os.fspath(reranker))
    candidates = list(texts)
    if isinstance(reranker, Predicts):
        said = reranker.predict([(question, text) for text in candidates])
    elif isinstance(reranker, Ranks):
        said = _by_number(reranker.rank(question, candidates), len(candidates))
    else:
        said = reranker(question, candidates)
    try:
        found = np.asarray(said, np.float64)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != (len(candidates),) or not np.isfinite(found).all():
        raise RetrievalError(
            f"the reranker must give one finite number for each of {len(candidates)} texts, got {said!r:.80}"
        )
    return found.tolist()


def _by_number(ranked: Any, count: int) -> list[float]:
    try:
        by_number = {int(row["corpus_id"]): float(row["score"]) for row in ranked}
        return [by_number[number] for number in range(count)]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise RetrievalError(
            f"rank() of a reranker must give a corpus_id and a score for each of {count} texts, got {ranked!r:.80}"
        ) from error


@lru_cache(maxsize=2)
def _loaded(name: str) -> Callable[[str, list[str]], Any]:
    from safetensors import SafetensorError

    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise MissingPackageError(
            "a reranker by name is a cross-encoder of sentence-transformers: pip install 'ragkv[embedder]'"
        ) from error
    try:
        model = CrossEncoder(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise RetrievalError(f"the reranker {name!r} cannot be loaded: {first_line(error)}") from error
    # Fast tokenizers keep their truncation as state, so two threads must not tokenise at once.
    lock = threading.Lock()

    def predict(question: str, texts: list[str]) -> Any:
        with lock:
            return model.predict([(question, text) for text in texts], show_progress_bar=False)

    return predict
