"""Files as documents: listed, removed by what people call them, kept in step with a folder; and what is said meanwhile."""

import logging
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from ragkv import ArgumentError, DocumentError, Progress, StoreFullError, TieredStore
from ragkv.library.sizes import token_bytes

from .rags import DOCUMENTS, QUESTION, keys, open_rag

NAMES = ["clearport.md", "blackfield.md"]


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / NAMES[0]).write_text(DOCUMENTS[NAMES[0]])
    (folder / "deep" / NAMES[1]).write_text(DOCUMENTS[NAMES[1]])
    return folder


@pytest.fixture
def rag(model, tmp_path):
    with open_rag(tmp_path / "rag", model) as rag:
        yield rag


def sources(rag):
    return [document.source for document in rag.documents()]


def test_documents(rag, docs):
    added = rag.add_files(docs)
    rag.add_texts(["Harps are made in Wye."], ["a note"], [{"by": "Anna"}])
    rag.pin(docs / NAMES[0])
    listed = rag.documents()
    assert [item.source for item in listed] == sorted([str(docs / NAMES[0]), str(docs / "deep" / NAMES[1]), "a note"])
    by_name = {Path(item.source).name: item for item in listed}
    text = DOCUMENTS[NAMES[0]]
    document = rag.engine.documents.cut(rag.chunker.split(text))
    first = by_name[NAMES[0]]
    assert (first.passages, first.tokens) == (len(document), sum(map(len, document)))
    assert first.kv_bytes == rag.engine.store.sizes(keys(rag, text)) and first.kv_bytes["disk"] > 0
    assert [item.pinned for item in by_name.values()].count(True) == 1 and first.pinned
    assert by_name["a note"].metadata == {"by": "Anna"}
    assert added.kv_bytes["disk"] == sum(item.kv_bytes["disk"] for name, item in by_name.items() if name != "a note")
    rag.unpin(docs / NAMES[0])
    for key in keys(rag, text):
        rag.engine.store.remove(key)
    assert rag.documents()[listed.index(first)].kv_bytes == {} and not rag.documents()[listed.index(first)].pinned


def test_a_document_is_removed_by_its_path(rag, docs, monkeypatch):
    rag.add_files(docs)
    monkeypatch.chdir(docs.parent)
    with pytest.raises(DocumentError, match=rf"did you mean '{docs}/deep/{NAMES[1]}'\? RAG.documents\(\) lists them"):
        rag.remove(NAMES[1])
    assert rag.remove(f"docs/{NAMES[0]}").document.source == str(docs / NAMES[0])
    assert sources(rag) == [str(docs / "deep" / NAMES[1])]


def test_a_document_whose_kv_cannot_be_removed(rag, docs, monkeypatch):
    rag.add_files(docs)

    def full(*args, **options):
        raise StoreFullError("the disk is full; nothing was changed")

    monkeypatch.setattr(rag.engine.store, "remove_many", full)
    with pytest.raises(StoreFullError, match=r"clearport.md is removed, but its KV are still stored: the disk is full"):
        rag.remove(docs / NAMES[0])
    assert {Path(source).name for source in sources(rag)} == {NAMES[1]}


def test_a_name_that_is_no_unicode(rag, docs, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    (odd / "inside.md").write_text("It lies by the sea.")
    (docs / "link.md").symlink_to(odd / "inside.md")
    (docs / os.fsdecode(b"\xff.md")).write_text("Nobody can name it.")
    for done in (rag.plan_files([docs, odd]), rag.add_files([docs, odd]), rag.sync(docs)):
        named = {Path(skipped.source).name: skipped.reason for skipped in done.skipped}
        assert {"link.md", os.fsdecode(b"\xff.md")} <= named.keys() <= {"link.md", os.fsdecode(b"\xff.md"), "inside.md"}
        assert all("is not valid Unicode: rename it" in reason for reason in named.values())
    assert {Path(source).name for source in sources(rag)} == set(NAMES)
    for call in (rag.remove, rag.pin, rag.unpin):
        with pytest.raises(DocumentError, match="no document is called"):
            call(odd / "inside.md")
    for call in (
        rag.documents,
        lambda **named: rag.add_texts(["Tar."], **named),
        lambda **named: rag.ask("Who?", **named),
    ):
        with pytest.raises(ArgumentError, match="namespace must be valid Unicode"):
            call(namespace="\ud800")


def test_a_link_is_what_it_points_to(rag, docs):
    (docs / "link.md").symlink_to(NAMES[0])
    (docs.parent / "folder").symlink_to("docs")
    rag.add_files([docs.parent / "folder", docs / "link.md"])
    assert sources(rag) == sorted([str(docs / NAMES[0]), str(docs / "deep" / NAMES[1])])
    assert rag.sync(docs.parent / "folder").unchanged == sources(rag)


def test_sync(rag, docs, tmp_path, reads):
    (tmp_path / "elsewhere.md").write_text("A file of another folder, on another harbour.")
    rag.add_files([docs, tmp_path / "elsewhere.md"])
    rag.add_texts(["Harps are made in Wye."], ["a note"])
    others = {"a note", str(tmp_path / "elsewhere.md")}
    (tmp_path / "elsewhere.md").unlink()
    changed, new = docs / NAMES[0], docs / "new.md"
    changed.write_text(changed.read_text() + " One more sentence.")
    new.write_text("Something new about harps.")
    (docs / "deep" / NAMES[1]).unlink()
    (docs / "bad.bin").write_bytes(b"\0\xff")

    before, seen = sources(rag), reads(rag.engine)
    dry = rag.sync(docs, dry_run=True)
    assert (dry.added, dry.changed, dry.moved) == ([str(new)], [str(changed)], {})
    assert dry.removed == [str(docs / "deep" / NAMES[1])] and [Path(item.source).name for item in dry.skipped] == [
        "bad.bin"
    ]
    assert dry.tokens > 0 and dry.kv_bytes == {} and seen == [] and sources(rag) == before

    done = rag.sync(docs)
    assert (done.added, done.changed, done.removed, done.skipped) == (dry.added, dry.changed, dry.removed, dry.skipped)
    assert done.tokens > 0 and done.kv_bytes["disk"] > 0
    assert set(sources(rag)) == {str(changed), str(new), *others}, "what lay elsewhere stays, though its file is gone"
    assert not any(key in rag.engine.store for key in keys(rag, DOCUMENTS[NAMES[1]]))
    assert rag.retriever.catalogue.check() == []
    again = rag.sync(docs)
    assert (again.unchanged, again.tokens) == (sorted([str(changed), str(new)]), 0) and not again.added


@pytest.mark.parametrize("way", ["add", "sync"])
def test_a_moved_folder_is_read_by_nobody(rag, docs, reads, way):
    rag.add_files(docs)
    question = rag.ask(QUESTION, max_new_tokens=4)
    ids = {hit.passage_id for hit in rag.retrieve(QUESTION, 50)}
    moved = docs.rename(docs.parent / "papers")
    shutil.move(moved / NAMES[0], moved / "deep" / "other name.md")
    seen, embedded = reads(rag.engine), []
    rag.retriever.embedder.encode_documents = lambda texts: embedded.append(texts)
    result = rag.add_files(moved) if way == "add" else rag.sync(moved)
    want = {
        str(moved / "deep" / "other name.md"): str(docs / NAMES[0]),
        str(moved / "deep" / NAMES[1]): str(docs / "deep" / NAMES[1]),
    }
    assert result.moved == want and sources(rag) == sorted(want)
    assert seen == [] and embedded == []
    assert {hit.passage_id for hit in rag.retrieve(QUESTION, 50)} == ids, "no passage stands twice"
    answer = rag.ask(QUESTION, max_new_tokens=4)
    assert answer.token_ids == question.token_ids and {hit.source for hit in answer.sources} <= want.keys()
    assert rag.retriever.catalogue.check() == []
    for key in keys(rag, DOCUMENTS[NAMES[0]]):
        rag.engine.store.remove(key)
    assert rag.ask(QUESTION, max_new_tokens=4).token_ids == question.token_ids, "read again in its context"


def test_a_copy_is_no_move(rag, docs):
    rag.add_files(docs)
    for name in ("one.md", "two.md"):
        shutil.copy(docs / NAMES[0], docs / name)
    assert rag.sync(docs).moved == {} and len(sources(rag)) == 4
    (docs / "one.md").unlink()
    shutil.copy(docs / NAMES[0], docs / "three.md")
    shutil.copy(docs / NAMES[0], docs / "four.md")
    synced = rag.sync(docs)
    assert synced.moved == {str(docs / "four.md"): str(docs / "one.md")} and synced.added == [str(docs / "three.md")]
    assert synced.removed == [] and len(sources(rag)) == 5


@pytest.mark.parametrize("source", ["/no-such-folder/page", "{gone}/a.md"])
def test_a_text_is_no_file_that_was_moved(rag, docs, tmp_path, source):
    source = source.format(gone=tmp_path / "gone")
    rag.add_texts(["The harbour is old."], [source], [{"lang": "en"}])
    (docs / "copy.md").write_text("The harbour is old.")
    assert not rag.add_files(docs / "copy.md").moved
    assert {document.source: document.metadata for document in rag.documents()}[source] == {"lang": "en"}


def test_a_name_that_nothing_on_the_disk_is_like_is_no_file(rag, docs):
    rag.add_texts(["The harbour is old."], ["/no-such-folder/page"])
    (docs / "copy.md").write_text("The harbour is old.")
    assert not rag.add_files(docs / "copy.md").moved
    assert rag.sync(docs).removed == []
    assert "/no-such-folder/page" in rag.retriever.catalogue


def test_a_text_that_is_called_as_a_file_would_be_is_none(rag, docs):
    """Its name lies in the folder, and nothing is there: no file of it was deleted, and none was moved."""
    named = [str(docs / "page 1 of report"), str(docs / "deep" / "note")]
    rag.add_texts(["The harbour is old.", "The quay is new."], named)
    (docs / "copy.md").write_text("The harbour is old.")
    rag.add_files(docs)
    synced = rag.sync(docs)
    assert not synced.removed and not synced.moved and set(named) < set(sources(rag))
    rag.add_texts(["The bridge is new."], [str(docs / NAMES[0])])  # no file's any more
    (docs / NAMES[0]).unlink()
    assert not rag.sync(docs).removed
    assert rag.add_files(docs / "copy.md").unchanged and rag.remove(named[0])


def test_a_file_that_is_back_is_not_removed(rag, docs, monkeypatch):
    """It was away for a moment while others were read, as an editor saves."""
    rag.add_files(docs)
    kept = next(iter(docs.rglob("*.md")))
    text = kept.read_text()
    kept.unlink()
    done = rag._intake._done

    def back(*args):
        kept.write_text(text)
        return done(*args)

    monkeypatch.setattr(rag._intake, "_done", back)
    assert rag.sync(docs).removed == [] and str(kept) in rag.retriever.catalogue


def test_a_folder_that_is_not_there_loses_nothing(rag, docs, tmp_path):
    rag.add_files(docs)
    before = sources(rag)
    for bad, reason in (
        (tmp_path / "none", "no folder that is there"),
        (docs / NAMES[0], "no folder"),
        ("", "no folder"),
        (3, "got 3"),
    ):
        with pytest.raises(DocumentError, match=reason):
            rag.sync(bad)
    shutil.rmtree(docs)
    with pytest.raises(DocumentError, match="no folder that is there"):
        rag.sync(docs)
    docs.mkdir()
    with pytest.raises(DocumentError, match=r"no file is left in .* Is its disk mounted"):
        rag.sync(docs)
    assert sources(rag) == before


def test_progress_inside_a_long_document(model, tmp_path, reads):
    """Behind every piece that the model has read, up to the whole."""
    (tmp_path / "docs").mkdir()
    long = "\n\n".join(DOCUMENTS.values())
    (tmp_path / "docs" / "long.md").write_text(long)
    (tmp_path / "docs" / "short.md").write_text(DOCUMENTS[NAMES[0]])
    with open_rag(tmp_path / "rag", model, piece_tokens=64) as rag:
        steps, seen = [], reads(rag.engine)
        added = rag.add_files(tmp_path / "docs", progress=steps.append)
        found = [step for step in steps if step.reason == "found"]
        read = steps[len(found) :]
        assert [Path(step.source).name for step in found] == ["long.md", "short.md"]
        assert all(step.reason == "new" and step.tokens == added.tokens_read == found[-1].tokens for step in read)
        done = [step.done_tokens for step in read]
        assert done == sorted(done) and done[0] == 0 and done[-1] == added.tokens_read
        assert len([step for step in read if Path(step.source).name == "long.md"]) > 10
        assert max(later - earlier for earlier, later in pairwise(done)) <= 64

        again: list[Progress] = []
        rag.add_files(tmp_path / "docs", progress=again.append)
        estimate = token_bytes(rag.engine.documents) * added.tokens_read
        assert {step.kv_bytes for step in found} == {0} and {step.kv_bytes for step in read} == {int(estimate)}
        assert {step.reason for step in again} == {"found"} and again[-1].tokens == 0

        seen.clear()
        for name in (long, DOCUMENTS[NAMES[0]]):
            for key in keys(rag, name):
                rag.engine.store.remove(key)
        asked: list[Progress] = []
        hits, pieces = rag.stream(QUESTION, top_k=2, max_new_tokens=3, progress=asked.append)
        assert asked == [], "nothing is read before the first piece is asked for"
        assert "".join(pieces)
        assert asked and asked[0].done_tokens == 0 and asked[-1].done_tokens == asked[-1].tokens == sum(seen)
        assert {step.source for step in asked} <= {hit.source for hit in hits} and {step.reason for step in asked} == {
            "missing"
        }
        warm: list[Progress] = []
        assert rag.ask(QUESTION, top_k=2, max_new_tokens=3, progress=warm.append).text is not None
        assert warm == []

        refreshed: list[Progress] = []
        tokens = rag.refresh(refreshed.append)
        assert refreshed[-1].done_tokens == refreshed[-1].tokens >= tokens > 0
        assert {step.reason for step in refreshed} == {"found", "missing"}


def test_windows_are_counted_as_they_are_run(model, tmp_path, reads):
    """A long document's windows overlap: more tokens are run than KV are stored."""
    with open_rag(tmp_path / "rag", model, document_tokens=128) as rag:
        steps, seen = [], reads(rag.engine)
        added = rag.add_texts(["\n\n".join(DOCUMENTS.values())], progress=steps.append)
        assert steps[-1].done_tokens == steps[-1].tokens == sum(seen) > added.tokens_read
        assert steps[-1].kv_bytes == int(token_bytes(rag.engine.documents) * added.tokens_read)


def test_what_was_read_before_ctrl_c_is_kept(model, tmp_path, reads):
    (tmp_path / "long.md").write_text("\n\n".join(DOCUMENTS.values()))
    with open_rag(tmp_path / "rag", model, piece_tokens=64) as rag:

        def stop(step):
            if step.done_tokens > 200:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rag.add_files(tmp_path / "long.md", progress=stop)
        steps: list[Progress] = []
        rest = rag.add_files(tmp_path / "long.md", progress=steps.append)
        assert 0 < rest.tokens_read == steps[-1].tokens < rag.documents()[0].tokens - 100
        assert steps[-1].reason == "missing"


@pytest.mark.parametrize("codec", ["raw", "int8", "fp8"])
def test_sizes_are_known_before_anything_is_read(model, tmp_path, codec):
    store = TieredStore(tmp_path / "rag" / "kv", codec=codec)
    with open_rag(tmp_path / "rag", model, store=store) as rag:
        estimate = token_bytes(rag.engine.documents)
        added = rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        assert added.kv_bytes["disk"] / added.tokens_read == pytest.approx(estimate, rel=0.5)
        assert codec != "raw" or estimate >= sum(2 * s.heads * s.key_dim * 4 for s in rag.engine.decoder.specs)


def test_room_is_looked_at_before_anything_is_read(model, tmp_path, reads, monkeypatch, caplog):
    with open_rag(tmp_path / "rag", model) as rag:
        seen = reads(rag.engine)
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr("ragkv.library.sizes.shutil.disk_usage", lambda path: usage)
        rag.engine.store.meta_put("made", b"")  # the file is there
        big = "\n\n".join(f"{name} {text}" for name in "abcdefgh" for text in DOCUMENTS.values())
        with pytest.raises(StoreFullError, match=r"take about [\d.]+ MiB, and the disk of .* Nothing was added"):
            rag.add_texts([big * 4])
        assert seen == [] and sources(rag) == []
        assert caplog.records == []


def test_a_budget_that_is_too_small_is_said_first(model, tmp_path, reads, caplog):
    with open_rag(model=model, store=TieredStore(cpu_bytes=300_000)) as rag:
        seen = reads(rag.engine)
        monitored = []

        def watch(step):
            if step.reason != "found":
                monitored.append((len(seen), len(caplog.records)))

        with caplog.at_level(logging.WARNING, "ragkv"):
            rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS), progress=watch)
        assert monitored[0] == (0, 1) and "what is used least goes from the store" in caplog.records[0].getMessage()
