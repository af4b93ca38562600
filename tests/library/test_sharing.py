"""One model, several threads: reading, questions and removals side by side, and what the disk is waited for."""

import threading
import time
from collections import Counter
from contextlib import contextmanager
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ragkv import Engine, PromptTemplate, Reuse, SensitiveTokens, TieredStore
from ragkv.library.documents import Documents
from ragkv.library.listing import kept_bytes, listed_documents
from ragkv.retrieval import Catalogue
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10])
QUESTION = random_ids(6)
PARTS = [random_ids(15, seed=number) for number in range(12)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def in_thread(work):
    """Whether some work gets done beside this thread; waits for it at most half a minute."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (work(), done.set()), daemon=True)
    thread.start()
    return done.wait(30)


def test_a_question_waits_for_no_write(model, tmp_path, monkeypatch):
    """While one thread writes to disk, another is answered."""
    with Engine(model, template=TEMPLATE, method=Reuse(), store=TieredStore(tmp_path)) as engine:
        warm = engine.add(PARTS[:2])
        answered, put = [], engine.store.put_many

        def slow(items, **more):
            answered.append(in_thread(lambda: engine.fuse(warm, QUESTION)))
            return put(items, **more)

        monkeypatch.setattr(engine.store, "put_many", slow)
        engine.add_document(PARTS[2:6])
        engine.fuse([PARTS[6], *warm], QUESTION)
        assert answered and all(answered)


@pytest.mark.parametrize("parts", [PARTS[2:], [random_ids(150)]], ids=["many chunks", "a long one"])
def test_a_question_waits_for_one_piece_of_reading(model, monkeypatch, parts):
    """Between any two pieces that reading computes, whoever waits for the model gets it."""
    engine = Engine(model, template=TEMPLATE, method=Reuse(), piece_tokens=16)
    warm, order, read, turn = engine.add(PARTS[:2]), [], engine.decoder.read, engine.runner.steps().turn
    line = engine.decoder.turns

    @contextmanager
    def answers():
        with turn() as found:
            yield found
            order.append("answer")

    def ask():
        monkeypatch.setattr(engine.runner.steps(), "turn", answers)
        engine.fuse(warm, QUESTION)

    asker = threading.Thread(target=ask)

    def counted(*args):
        order.append("piece")
        if len(order) == 1:
            asker.start()
            end = time.monotonic() + 30
            while not line._waiting and time.monotonic() < end:
                time.sleep(1e-3)
        return read(*args)

    monkeypatch.setattr(engine.decoder, "read", counted)
    engine.add_document(parts)
    asker.join()
    assert order.count("piece") == 10 and order.index("answer") <= 2


def test_a_model_that_changes_between_two_pieces(monkeypatch):
    """No document is read half with the one and half with the other."""
    model = tiny_model()
    engine = Engine(model, template=TEMPLATE, method=Reuse(), piece_tokens=16)
    read, pieces = engine.decoder.read, []
    monkeypatch.setattr("ragkv.library.costs._prefill", lambda reader, cached, new: 1e-3)  # it reads, too

    def writes(*args):
        pieces.append(read(*args))
        if len(pieces) == 3:
            with torch.no_grad():
                model.model.layers[1].self_attn.v_proj.weight.mul_(-1)
        return pieces[-1]

    monkeypatch.setattr(engine.decoder, "read", writes)
    fused = engine.fuse(engine.add_document(PARTS[:6]), QUESTION)
    assert len(pieces) == 3 + 1 + 6, "three pieces, then the anchor and all six anew"
    again = Engine(model, template=TEMPLATE, method=Reuse())
    torch.testing.assert_close(fused.logits, again.fuse(again.add_document(PARTS[:6]), QUESTION).logits)


def test_one_transaction_for_all_that_is_missing(model, tmp_path, monkeypatch):
    with Engine(model, template=TEMPLATE, method=Reuse(), store=TieredStore(tmp_path)) as engine:
        chunks, writes = engine.add(PARTS), Counter()
        engine.store.remove_many(engine.documents.keys(chunks))
        environment = engine.store._disk.environment
        write = environment._writing
        monkeypatch.setattr(environment, "_writing", lambda suspicious: writes.update(write=1) or write(suspicious))
        assert engine.fuse(chunks, QUESTION).report.hits == {"computed": 12}
        assert writes["write"] == 1
        assert set(engine.fuse(chunks, QUESTION).report.hits) == {"cpu"} and writes["write"] == 1
        engine.fuse([random_ids(9), random_ids(8), *chunks], QUESTION)
        assert writes["write"] == 2, "what is given as text is added together"
        assert engine.forget(chunks) == 12 and writes["write"] == 3


def test_what_was_forgotten_stays_so(model, tmp_path):
    """Chunks that are held on to may be asked for: they are computed, and not stored."""
    with Engine(model, template=TEMPLATE, method=Reuse(), store=TieredStore(tmp_path)) as engine:
        document, alone = engine.add_document(PARTS[:3]), engine.add(PARTS[3:4])
        want = engine.fuse([*document, *alone], QUESTION)
        engine.forget(document)
        for _ in range(2):
            got = engine.fuse([*document, *alone], QUESTION)
            assert got.report.hits == {"computed": 3, "cpu": 1} and len(engine.store) == 1
            assert float((got.logits - want.logits).abs().max()) < 1e-4
        engine.add_document(PARTS[:3])
        assert set(engine.fuse(document, QUESTION).report.hits) == {"cpu"}


def test_removed_while_it_is_read(model, monkeypatch):
    """A removal that comes between the look for a document and the writing of its KV is not undone."""
    engine = Engine(model, template=TEMPLATE, method=Reuse())
    document = engine.add_document(PARTS[:3])
    engine.store.remove_many(engine.documents.keys(document))
    put = engine.store.put_many

    def late(items, **more):
        engine.forget(document)
        return put(items, **more)

    monkeypatch.setattr(engine.store, "put_many", late)
    assert engine.fuse(document, QUESTION).report.hits == {"computed": 3}
    assert len(engine.store) == 0


def test_another_foreign_text_is_measured_with(model, tmp_path):
    """Sensitivities belong to the text that they were measured with."""
    method, seen = SensitiveTokens(0.2), []
    for foreign in (random_ids(40, seed=1), random_ids(40, seed=2), random_ids(40, seed=2)):
        with Engine(model, template=TEMPLATE, method=method, foreign=foreign, store=TieredStore(tmp_path)) as engine:
            chunks = engine.add_document(PARTS[:2]) + engine.add_document(PARTS[2:4])
            prompt = engine.fuse(chunks, QUESTION)
            kv = engine.store.get(engine.documents.key(chunks[3]))
            seen.append((prompt.report.hits.get("computed", 0), kv.foreign, kv.sensitivity.tolist()))
    assert [computed for computed, *_ in seen] == [0, 4, 0]
    assert seen[0][1] != seen[1][1] == seen[2][1] and seen[0][2] != seen[1][2] == seen[2][2]


def test_a_namespace_is_one_object_however_many_begin_it_at_once(model, monkeypatch):
    """What one thread tells it of a catalogue, the others' prompts know; else their KV would not be kept."""
    engine, together = Engine(model, template=TEMPLATE), threading.Barrier(2)
    cut_as = Documents._cut_as
    monkeypatch.setattr(Documents, "_cut_as", lambda self, name: (together.wait(30), cut_as(self, name)))
    got = []
    threads = [threading.Thread(target=lambda: got.append(engine.documents.within("a"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(got) == 2 and got[0] is got[1] is engine.documents.within("a")
    assert engine.documents.within(Enum("Team", {"A": "a"}, type=str).A) is got[0]


@pytest.mark.parametrize("listing", [listed_documents, kept_bytes])
def test_whoever_lists_documents_waits_for_no_store_in_their_catalogue(listing):
    """A fork locks one folder after the other: it waited for the catalogue, and the list for the store, for ever."""
    with Catalogue() as catalogue:
        catalogue.put("a", ["one"], lambda texts: np.ones((len(texts), 2), np.float32))
        inside = catalogue._environment.gate._inside
        store = SimpleNamespace(sizes=lambda keys: {"inside": len(inside)}, pinned=lambda keys: list(inside))
        found = listing(catalogue, store)
        if listing is listed_documents:
            assert [(each.source, each.kv_bytes, each.pinned) for each in found] == [("a", {"inside": 0}, False)]
        else:
            assert found == {"inside": 0}
