"""A changed file under `repair_tokens`: little is computed, the mark survives a restart, and nothing else changes."""

import zlib

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ragkv import RAG, Engine, PromptTemplate, Reuse, TieredStore
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
        MODEL,
        TOKENIZER,
        store=TieredStore(path / "kv", cpu_bytes=0),
        method=Reuse(),
        template=PromptTemplate(prefix="Read.\n"),
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
        monkeypatch.setattr(
            rag.engine.decoder, "step", lambda ids, *rest, **more: (rows.append(len(ids)), step(ids, *rest, **more))[1]
        )
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


def test_a_repair_belongs_to_its_version(tmp_path):
    """Removed, edited once more, or continued: what was repaired is gone, and nothing else is."""
    edited = [PARAGRAPHS[0], PARAGRAPHS[1].replace("Mersey", "Tyne"), *PARAGRAPHS[2:]]
    again = [*edited[:3], edited[3].replace("Ireland", "Wales")]
    with open_rag(tmp_path / "rag", repair_tokens=8) as rag:

        def add(passages, source="a"):
            rag.add_texts(["\n\n".join(passages)], [source])
            chunks = rag.chunks(rag.retrieve("river", 50))
            assert rag.engine.documents.missing(chunks) == []
            return sum(bool(chunk.mark) for chunk in chunks), len(rag.engine.store)

        assert add(PARAGRAPHS) == (0, 4)
        assert add(edited) == (1, 4)
        assert add(edited) == (1, 4)
        assert add(again) == (1, 4)
        assert add([*again, "One more thing was said."]) == (1, 5)
        rag.remove("a")
        assert len(rag.engine.store) == 0
        # another document of the same passages is read exactly, and keeps what it shares with no one
        add(PARAGRAPHS)
        add(edited)
        assert add(edited, "b") == (1, 7)
        rag.remove("a")
        assert len(rag.engine.store) == 4
        assert rag.ask("Which river?", max_new_tokens=2).report.fusion.hits == {"disk": 4}


def test_neighbours_come_along(tmp_path):
    with open_rag(tmp_path / "rag", repair_tokens=None) as rag:
        rag.add_texts(["\n\n".join(PARAGRAPHS), "Quite another text, of a river too."], ["a", "b"])
        alone = rag.retrieve(PARAGRAPHS[2], 1)
        assert [(hit.source, hit.position) for hit in alone] == [("a", 2)]
        more = rag.retrieve(PARAGRAPHS[2], 1, neighbours=1)
        assert [hit.position for hit in more] == [1, 2, 3]
        assert [hit.text for hit in more] == rag.retriever.catalogue.texts("a")[1:]
        assert len({hit.passage_id for hit in more}) == 3
        every = rag.retrieve(PARAGRAPHS[2], 2, neighbours=9)
        assert len(every) == len({(hit.source, hit.position) for hit in every})
        assert len(rag.ask("Which river?", top_k=1, neighbours=1, max_new_tokens=2).sources) > 1


def test_an_edit_keeps_what_later_windows_still_use(tmp_path):
    """A long document is read in windows: those behind the one that changed keep their KV."""
    engine = Engine(MODEL, TOKENIZER, template=PromptTemplate(prefix="Read.\n"), document_tokens=64)
    with RAG(engine, Retriever.open(None, Embedder()), TokenChunker(TOKENIZER, 30)) as rag:
        text = "\n\n".join(PARAGRAPHS * 3)
        rag.add_texts([text], ["long"])
        rag.add_texts([text.replace("narrow", "empty", 1)], ["long"])
        passages = rag.retriever.catalogue.texts("long")
        assert rag.engine.documents.missing(list(rag.engine.documents.cut(passages))) == []
        assert len(rag.engine.store) == len(set(rag.engine.documents.keys_of(rag.engine.documents.cut(passages))))
