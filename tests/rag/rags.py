"""What tests of RAG share: bundled documents, a tiny model, an embedder of hashed words."""

import zlib

import numpy as np
from transformers import PreTrainedTokenizerFast

from ragkv import RAG, Engine, PromptTemplate, Reuse, TieredStore
from ragkv.bundled import MODEL_PATH, documents
from ragkv.retrieval import Retriever, TokenChunker
from ragkv.testing import tiny_model

DOCUMENTS = dict(list(documents().items())[:6])
TEXTS = dict(list(DOCUMENTS.items())[:3])  # what is published
QUESTION = "On which river does Clearport lie?"
TEMPLATE = PromptTemplate(prefix="Read.\n", after_chunk="\n", before_question="Question:", after_question="\nAnswer:")
TOKENIZER = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)


class WordEmbedder:
    """Deterministic and instant: a bag of hashed words."""

    dimension = 128

    def __init__(self, name="words"):
        self.name = self.fingerprint = name

    def encode_query(self, text):
        vector = np.zeros(self.dimension, np.float32)
        for word in text.lower().replace("?", "").replace(".", "").split():
            vector[zlib.crc32(word.encode()) % self.dimension] += 1 / len(word) ** 0.1
        return vector / np.linalg.norm(vector)

    def encode_documents(self, texts):
        return np.stack([self.encode_query(text) for text in texts])


def small_model(seed=0):
    return tiny_model(vocab_size=1792, seed=seed)


def open_rag(path=None, model=None, embedder=None, template=TEMPLATE, tokenizer=TOKENIZER, **engine_options):
    retriever = Retriever.open(None if path is None else path / "documents", embedder or WordEmbedder())
    try:
        store = TieredStore(None if path is None else path / "kv", cpu_bytes=64 << 20, disk_bytes=1 << 30)
        engine_options = {"store": store, "method": Reuse(), **engine_options}
        return RAG(
            Engine(model or small_model(), tokenizer, template=template, **engine_options),
            retriever,
            TokenChunker(TOKENIZER, 48),
        )
    except BaseException:
        retriever.close()
        store.close()
        raise


def tokens_of(rag, text, begin=0):
    return sum(len(chunk) for chunk in list(rag.engine.documents.cut(rag.chunker.split(text)))[begin:])


def keys(rag, text):
    return rag.engine.documents.keys_of(rag.engine.documents.cut(rag.chunker.split(text)))


def files(pool):
    return {file: file.read_bytes() for file in pool.rglob("*") if file.is_file()}


def sources(rag):
    assert rag.retriever.catalogue.check() == []
    return {document.source: rag.retriever.catalogue.texts(document.source) for document in rag.retriever.catalogue}
