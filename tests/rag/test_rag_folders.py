"""Folders survive restarts and crashes, and belong to one model and one embedder."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from ragkv import IncompatibleFolderError, PromptTemplate, StoreError
from ragkv.retrieval import TokenChunker
from ragkv.store.maintenance import history

from .rags import DOCUMENTS, QUESTION, WordEmbedder, open_rag, small_model, tokens_of

PROGRAM = Path(__file__).with_name("rag_killed.py")


def test_a_restart_keeps_everything(model, tmp_path, reads):
    with open_rag(tmp_path, model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        want = rag.ask(QUESTION, max_new_tokens=5)
    with open_rag(tmp_path, model) as rag:
        seen = reads(rag.engine)
        got = rag.ask(QUESTION, max_new_tokens=5)
        assert got.report.fusion.hits == {"disk": 5}
        assert (got.token_ids, [hit.text for hit in got.sources]) == (
            want.token_ids,
            [hit.text for hit in want.sources],
        )
        assert rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS)).tokens_read == rag.refresh() == sum(seen) == 0
    with open_rag(tmp_path, model, template=PromptTemplate(prefix="Another instruction.\n", after_chunk="\n")) as rag:
        assert rag.refresh() == sum(tokens_of(rag, text) for text in DOCUMENTS.values())


def test_a_folder_serves_several_models(model, tmp_path):
    """Texts and vectors belong to the user, KV to the model: another one reads what it needs, and nothing is lost."""
    other = small_model(seed=1)
    with open_rag(tmp_path, model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        want, entries = rag.ask(QUESTION, max_new_tokens=5), len(rag.engine.store)
    with open_rag(tmp_path, other) as rag:
        embedded = rag.add_texts(list(DOCUMENTS.values())[:1], list(DOCUMENTS)[:1]).changes[0].embedded
        answer = rag.ask(QUESTION, max_new_tokens=5)
        assert (embedded, answer.sources) == (0, want.sources)
        fresh = tiny_answer(other, answer)
        assert answer.token_ids == fresh
        rag.refresh()
        assert len(rag.engine.store) == 2 * entries
    with open_rag(tmp_path, model) as rag:
        assert rag.refresh() == 0
        got = rag.ask(QUESTION, max_new_tokens=5)
        assert (got.token_ids, got.report.fusion.hits) == (want.token_ids, {"disk": 5})
        rag.remove("clearport.md")  # what any model kept of it goes
        gone = entries - len(rag.engine.store) // 2
        assert gone > 0 and len(rag.engine.store) % 2 == 0


def letters(texts, **_):
    """A tokenizer of another model."""
    return {"input_ids": [[0] * (len(text) // 9 + 1) for text in texts]}


def tiny_answer(model, answer):
    """What a folder of this model alone answers."""
    with open_rag(None, model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        return rag.ask(QUESTION, max_new_tokens=len(answer.token_ids)).token_ids


def test_a_folder_of_another_embedder_is_refused(model, tmp_path):
    with open_rag(tmp_path, model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
    with pytest.raises(IncompatibleFolderError, match=r"made with the embedder words .*, got others"):
        open_rag(tmp_path, model, WordEmbedder("others"))
    with open_rag(tmp_path, model) as rag:  # nothing was left open, and nothing was lost
        assert rag.refresh() == 0
        assert rag.ask(QUESTION, max_new_tokens=2).report.fusion.hits == {"disk": 5}


def test_a_warm_question_tokenises_nothing_but_itself(model, tmp_path, monkeypatch):
    """Law 15, after a restart: what a chunk is stands in the catalogue."""
    with open_rag(tmp_path, model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
    with open_rag(tmp_path, model) as rag:
        said = []
        encode = rag.engine.encoder.ids
        monkeypatch.setattr(rag.engine.encoder, "ids", lambda text, **more: said.append(text) or encode(text, **more))
        monkeypatch.setattr(rag.chunker, "spans", None)
        answer = rag.ask(QUESTION, max_new_tokens=2)
        assert said == [QUESTION] and answer.report.fusion.hits == {"disk": 5}


def test_a_warm_question_writes_nothing(model, tmp_path, monkeypatch):
    """Law 15, from the first question after a restart on: no transaction that writes, nothing synced, no index of words made."""
    kinds = ({}, {"hybrid": True, "hops": 2}, {"where": {"source": "clearport.md"}, "max_context_tokens": 200})
    with open_rag(tmp_path, model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        want = [rag.ask(QUESTION, max_new_tokens=2, **options).token_ids for options in kinds]
    with open_rag(tmp_path, model) as rag:
        written, statements = [], []
        monkeypatch.setattr("ragkv.folder.Environment._writing", lambda self, _: written.append(self.path))
        monkeypatch.setattr("ragkv.folder.Environment.sync", lambda self: written.append(self.path))
        rag.retriever._indexes.words._opened().set_trace_callback(statements.append)
        assert [rag.ask(QUESTION, max_new_tokens=2, **options).token_ids for options in kinds] == want
        assert written == [] and statements
        assert not [line for line in statements if line.startswith(("BEGIN IMMEDIATE", "INSERT", "DELETE"))]
        monkeypatch.undo()


def test_what_is_prefetched_for_a_question_came_from_disk(model, tmp_path, monkeypatch):
    """However far the store is with it when the first piece is asked for; another question finds it in memory."""
    with open_rag(tmp_path, model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
    with open_rag(tmp_path, model) as rag:
        want = rag.ask(QUESTION, max_new_tokens=1).report.fusion
        assert want.hits == {"disk": 5} and want.bytes_read > 0
    with open_rag(tmp_path, model) as rag:
        prefetch = rag.engine.store.prefetch
        monkeypatch.setattr(rag.engine.store, "prefetch", lambda *args: prefetch(*args).result(30))
        for source, size in (("disk", want.bytes_read), ("cpu", 0)):
            _, pieces = rag.stream(QUESTION, max_new_tokens=1)
            list(pieces)
            report = pieces.report.fusion
            assert (report.hits, report.sources, report.bytes_read) == ({source: 5}, [source] * 5, size)
        assert rag.engine.store.stats().hits == {"gpu": 0, "cpu": 5, "disk": 5}
    assert history(tmp_path / "kv").hits["disk"] >= 10


def test_text_that_did_not_change_is_not_cut_again(model, tmp_path):
    """Another model's tokens would cut it elsewhere: passages and vectors stay, for all models."""
    with open_rag(tmp_path, model) as rag:
        before = [change.document for change in rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS)).changes]
    with open_rag(tmp_path, model) as rag:
        rag.chunker = TokenChunker(letters, 48)
        assert [rag.chunker.split(text) for text in DOCUMENTS.values()] != [
            rag.retriever.catalogue.texts(name) for name in DOCUMENTS
        ]
        assert [
            change.document for change in rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS)).changes
        ] == before


def test_killed_while_adding(warm, model, tmp_path):
    """After every kill the folder opens and answers; in the end it holds what a folder holds that was never killed."""
    child = [*warm, PROGRAM, tmp_path]
    run = subprocess.run(child, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    rounds = json.loads(run.stdout.splitlines()[-1])
    assert any(done["killed"] for done in rounds)
    counts = [done["documents"] for done in rounds]
    assert counts == sorted(counts)  # what was committed stays
    with open_rag(tmp_path / "killed", model) as killed, open_rag(tmp_path / "calm", model) as calm:
        killed.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        if "extra" in killed.retriever.catalogue:
            killed.remove("extra")
        assert killed.refresh() == calm.refresh() == 0
        got, want = killed.ask(QUESTION, max_new_tokens=5), calm.ask(QUESTION, max_new_tokens=5)
        assert got.token_ids == want.token_ids
        assert "computed" not in got.report.fusion.hits


def test_killed_while_removing(warm, tmp_path):
    """Behind whichever write: the document is gone, and what is left of its KV goes when the folder is opened next."""
    child = [*warm, PROGRAM.with_name("rag_cut_short.py"), tmp_path]
    run = subprocess.run(child, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    *killed, calm = map(json.loads, run.stdout.splitlines())
    assert [one.pop("killed") for one in killed] == [True] * 4 and not calm.pop("killed")
    assert calm["there"] and not calm["wrong"] and killed == [calm] * 4


def test_one_process_changes_a_folder_one_asks_and_one_looks_after_it(warm, tmp_path):
    """Every answer is of one state; what is just being written is neither damaged nor an orphan; compact waits for both."""
    child = [*warm, PROGRAM.with_name("rag_three.py"), tmp_path, "3"]
    run = subprocess.run(child, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    done = json.loads(run.stdout.splitlines()[-1])
    assert min(done.values()) > 0 and done["ask"] > 2


@pytest.mark.parametrize("record", ["of another document", "damaged"])
def test_a_record_that_is_not_the_documents_is_found_out_anew(model, tmp_path, record):
    with open_rag(tmp_path, model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        want = rag.ask(QUESTION, max_new_tokens=4)
        catalogue = rag.retriever.catalogue
        with catalogue.snapshot() as view:
            [one] = [document for document in view.documents() if document.source == want.sources[0].source]
            [reading] = view.readings(one)
            [wrong] = view.readings(next(document for document in view.documents() if document.source != one.source))
        catalogue.keep([(one, reading._replace(record=wrong.record if record == "of another document" else b"junk"))])
        got = rag.ask(QUESTION, max_new_tokens=4)
        assert (got.token_ids, got.sources) == (want.token_ids, want.sources)


def test_a_folder_that_may_not_be_written_to_answers(model, tmp_path, forked):
    """From stored KV, by vectors and words; a question whose KV are missing reads them, and keeps nothing."""
    folder = tmp_path / "rag"
    kinds = ({}, {"hybrid": True, "hops": 2}, {"where": {"source": "clearport.md"}})

    def answers(rag):
        return [(rag.ask(QUESTION, max_new_tokens=3, **options).token_ids) for options in kinds]

    with open_rag(folder, model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        want = answers(rag)
        rag.engine.store.remove(next(iter(rag.engine.documents.keys(rag.chunks(rag.retrieve(QUESTION))))))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in folder.parents[:4]:
        parent.chmod(0o755)

    def work():
        if os.geteuid() == 0:
            os.setuid(65534)
        with open_rag(folder, model) as rag:
            assert answers(rag) == answers(rag) == want
            for change in (lambda: rag.add_texts(["New."], ["new"]), lambda: rag.remove("clearport.md")):
                with pytest.raises(StoreError, match="open for reading only"):
                    change()
            assert answers(rag) == want
        return "ok"

    try:
        assert forked(work) == "ok"
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
