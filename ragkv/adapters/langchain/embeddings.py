"""Embedders of ragkv for LangChain, and embeddings of LangChain for ragkv."""

from __future__ import annotations

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

from ragkv.chunk import digest
from ragkv.errors import ArgumentTypeError, RetrievalError, instance
from ragkv.retrieval import Embedder, offline_embedder


class RagKVEmbeddings(Embeddings):
    """An embedder of ragkv as LangChain's embeddings.

    Args:
        embedder: turns texts into vectors; by default the offline one of ``ragkv[offline]``.
    """

    def __init__(self, embedder: Embedder | None = None) -> None:
        self.embedder: Embedder = offline_embedder() if embedder is None else embedder
        instance("embedder", self.embedder, Embedder, "a ragkv.retrieval.Embedder")

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """The vectors of texts."""
        return self.embedder.encode_documents(list(texts)).tolist() if texts else []

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        return self.embedder.encode_query(text).tolist()


class LangChainEmbedder:
    """LangChain's embeddings as an embedder of ragkv: ``RAG.from_pretrained(embedder=LangChainEmbedder(embeddings))``.

    Vectors are scaled to length one.

    Args:
        embeddings: turn texts into vectors. One text is embedded here, to see how long they are.
        fingerprint: differs whenever the same text may get another vector: a folder is opened with the one that it was made with.
            By default made from the class and the model's name, where the embeddings have one as ``model`` or ``model_name``, and
            from that one vector where not.
    """

    def __init__(self, embeddings: Embeddings, fingerprint: str | None = None) -> None:
        instance("embeddings", embeddings, Embeddings, "langchain_core.embeddings.Embeddings")
        self.embeddings = embeddings
        vector = _scaled(embeddings.embed_query("ragkv"))
        model = next((m for a in ("model", "model_name") if isinstance(m := getattr(embeddings, a, None), str)), "")
        kind = f"{type(embeddings).__module__}.{type(embeddings).__qualname__}"
        self.name: str = model or type(embeddings).__name__
        self.dimension: int = len(vector)
        known = model or vector.astype("<f4").tobytes()
        self.fingerprint: str = fingerprint or digest(kind, str(self.dimension), known).hex()[:16]

    def encode_documents(self, texts: list[str]) -> NDArray[np.float32]:
        """The vectors of passages, float32 ``[n, d]``, each of length one."""
        return _scaled(self.embeddings.embed_documents(texts)) if texts else np.empty((0, self.dimension), np.float32)

    def encode_query(self, text: str) -> NDArray[np.float32]:
        """The vector of a question, float32 ``[d]``, of length one."""
        return _scaled(self.embeddings.embed_query(text))


def embedder_of(embeddings: Embeddings | None) -> Embedder | None:
    """The embedder of ragkv that embeddings are; its own where they are made of one.

    Raises:
        ArgumentTypeError: they are no embeddings.
    """
    if embeddings is None:
        return None
    return embeddings.embedder if isinstance(embeddings, RagKVEmbeddings) else LangChainEmbedder(embeddings)


def _scaled(vectors: list[float] | list[list[float]]) -> NDArray[np.float32]:
    try:
        given = np.asarray(vectors, np.float32)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"embeddings must give lists of numbers of one length: {error}") from error
    if not given.size or not np.isfinite(given).all():
        raise RetrievalError(f"embeddings must give finite numbers, got {vectors!r:.80}")
    return given / np.maximum(np.linalg.norm(given, axis=-1, keepdims=True), 1e-12)
