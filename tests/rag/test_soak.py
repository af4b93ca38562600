"""Documents come and go while questions are asked: every answer is that of some state of the folder."""

import math
import threading
import time

import pytest

from ragkv import FullPrefill
from ragkv.store.maintenance import entries

from .rags import DOCUMENTS, QUESTION, open_rag

NAMES = list(DOCUMENTS)[:4]


def version(name, number):
    """A document as it is in one of its versions; each says which, in every paragraph."""
    return "\n\n".join(f"{part} This is version {number}." for part in DOCUMENTS[name].split(". ") if part.strip())


def soak(model, path, seconds, enough=math.inf, askers=2, **options):
    """Writers, removers and askers together, for a time or until there are enough answers; these, and what went wrong."""
    failures, answers, over = [], [], threading.Event()
    with open_rag(path, model, **options) as rag:
        rag.add_texts([version(name, 0) for name in NAMES], NAMES)

        def beside(work):
            def run():
                number = 0
                while not over.is_set():
                    number += 1
                    try:
                        work(number)
                    except Exception as error:
                        failures.append(error)
                        over.set()

            return threading.Thread(target=run)

        def write(number):
            rag.add_texts([version(NAMES[number % 3], number)], [NAMES[number % 3]])

        def remove(number):
            rag.remove(NAMES[3])
            rag.add_texts([version(NAMES[3], number)], [NAMES[3]])

        def ask(number):
            answer = rag.ask(QUESTION, top_k=4, max_new_tokens=2)
            answers.append([(hit.source, hit.text) for hit in answer.sources])

        threads = [beside(write), beside(remove), *[beside(ask) for _ in range(askers)]]
        for thread in threads:
            thread.start()
        begin = time.monotonic()
        while time.monotonic() - begin < seconds and len(answers) < enough and not over.is_set():
            time.sleep(0.05)
        over.set()
        for thread in threads:
            thread.join()
        assert rag.retriever.catalogue.check() == []
        if rag.engine.paths is not None:  # what is kept late of a document removed by then goes again
            rag.engine.paths.wait()
        kept = {key for document in rag.retriever.catalogue for key in named(rag, document)}
        with rag.retriever.catalogue.snapshot():
            stored = {key for tier in (rag.engine.store,) for key in stored_keys(tier)}
        if rag.engine.paths is not None:
            labels = {entry.key: entry.label.split() for entry in entries(path / "kv") if entry.key.startswith(b"path")}
            there = {key[:4].hex() for key in kept}
            assert all(set(tags) <= there for tags in labels.values()), "nor what was computed of it"
            stored -= labels.keys()
        assert stored <= kept, "what was removed is gone"
    return answers, failures


def named(rag, document):
    with rag.retriever.catalogue.snapshot() as view:
        return [key for reading in view.readings(document) for key in reading.keys]


def stored_keys(store):
    return store._disk.stored() if store._disk is not None else []


def consistent(answer):
    """Whether the passages of each document are of one version."""
    versions = {}
    for source, text in answer:
        said = {word for word in text.replace(".", "").split() if word.isdigit() and f"version {word}" in text}
        versions.setdefault(source, set()).update(said)
    return all(len(found) <= 1 for found in versions.values())


each_way = pytest.mark.parametrize(
    "options",
    [{}, {"context": "chunk"}, {"paths": True, "method": FullPrefill()}],
    ids=["in documents", "alone", "with paths"],
)


@each_way
def test_questions_while_documents_change(model, tmp_path, options):
    answers, failures = soak(model, tmp_path, 8, 60, **options)
    assert not failures, failures[0]
    assert len(answers) > 5 and all(map(consistent, answers))


@pytest.mark.long
@each_way
def test_a_minute_of_it(model, tmp_path, options):
    answers, failures = soak(model, tmp_path, 60, askers=3, **options)
    assert not failures, failures[0]
    assert len(answers) > 30 and all(map(consistent, answers))
