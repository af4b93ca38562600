"""Retrieval: files in, passages cut, embedded and listed, the nearest ones found. Knows no language model.

Nothing here imports faiss, sentence-transformers, lmdb or pypdf before it is needed.
"""

from ragkv.retrieval.catalogue import Catalogue
from ragkv.retrieval.chunker import TokenChunker
from ragkv.retrieval.embedder import Embedder, SentenceTransformerEmbedder, offline_embedder
from ragkv.retrieval.hit import Hit
from ragkv.retrieval.index import FaissIndex, VectorIndex
from ragkv.retrieval.loaders import LoadedFile, SkippedFile, load_files, read_file
from ragkv.retrieval.options import Retrieval
from ragkv.retrieval.records import Change, Document, Passage, Reading
from ragkv.retrieval.retriever import Retriever
from ragkv.retrieval.segments import SegmentedIndex
from ragkv.retrieval.snapshot import Snapshot

__all__ = [
    "Catalogue",
    "Change",
    "Document",
    "Embedder",
    "FaissIndex",
    "Hit",
    "LoadedFile",
    "Passage",
    "Reading",
    "Retrieval",
    "Retriever",
    "SegmentedIndex",
    "SentenceTransformerEmbedder",
    "SkippedFile",
    "Snapshot",
    "TokenChunker",
    "VectorIndex",
    "load_files",
    "offline_embedder",
    "read_file",
]
