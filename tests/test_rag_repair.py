"""A changed file under `repair_tokens`: little is computed, the mark survives a restart, and nothing else changes."""

import zlib

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ragkv import RAG, Engine, PromptTemplate, TieredStore
from ragkv.bundled import MODEL_PATH
from ragkv.retrieval import Retriever, TokenChunker
from ragkv.testing import tiny_model

TOKENIZER = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
MODEL = tiny_model(vocab_size=1792)
PARAGRAPHS = [
    "The school looked narrow in the morning. Everyone agreed that the year had been quiet and long.",
    "Its river is the Mersey. The papers wrote about a strange ladder in the square behind the church.",
    "Nobody in the harbour was surprised. A heavy wall stood near the inn for most of the decade.",
    "The company's largest market is Ireland. Old friends still talk about that pleasant spring.",
]


class Embedder:
    name = fingerprint = "letters"
    dimension = 32

    def encode_query(self, text):
        vector = np.ones(32, np.float32)
        for word in text.split():
            vector[zlib.crc32(word.encode()) % 32] += 1
        return vector / np.linalg.norm(vector)

    def encode_documents(self, texts):
        return np.stack([self.encode_query(text) for text in texts])


def open_rag(path, repair_tokens):
    engine = Engine(
        MODEL, TOKENIZER, store=TieredStore(path / "kv", cpu_bytes=0), template=PromptTemplate(prefix="Read.\n")
    )
    return RAG(engine, Retriever.open(path / "documents", Embedder()), TokenChunker(TOKENIZER, 30), repair_tokens)


def test_a_changed_file_is_repaired(tmp_path, monkeypatch):
    file = tmp_path / "a.md"
    file.write_text("\n\n".join(PARAGRAPHS))
    edited = [PARAGRAPHS[0], PARAGRAPHS[1].replace("Mersey", "Tyne"), *PARAGRAPHS[2:]]
    with open_rag(tmp_path / "rag", repair_tokens=8) as rag:
        rag.add_files(file)
        before = len(rag.engine.store)
        assert before == 4
        rows, step = [], rag.engine.decoder.step
        monkeypatch.setattr(rag.engine.decoder, "step", lambda ids, *rest: (rows.append(len(ids)), step(ids, *rest))[1])
        file.write_text("\n\n".join(edited))
        rag.add_files(file)
        new = rag.engine.encoder.chunk(edited[1])
        assert rows == [len(new) + 8]
        assert len(rag.engine.store) == before  # what the old version alone used is gone
        hits = rag.retrieve("river Tyne", 4)
        want = rag.engine.fuse(rag.chunks(hits), "Which river?")
        assert set(want.report.hits) == {"disk"}
        assert rag.add_files(file).tokens_read == 0
    with open_rag(tmp_path / "rag", repair_tokens=None) as rag:
        assert rag.add_files(file).tokens_read == 0
        got = rag.engine.fuse(rag.chunks(rag.retrieve("river Tyne", 4)), "Which river?")
        assert set(got.report.hits) == {"disk"}
        torch.testing.assert_close(got.logits, want.logits)
        source = rag.retriever.catalogue.documents()[0].source
        rag.remove(source)
        assert len(rag.engine.store) == 0
