"""One catalogue folder in several objects, threads and processes; folders that may not be written to or were replaced."""

from __future__ import annotations

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ragkv.errors import RetrievalError, StoreError
from ragkv.retrieval import Catalogue, Retriever

from .conftest import HashEmbedder, put


def test_a_second_catalogue_in_one_process_shares_the_first(tmp_path):
    with Catalogue(tmp_path / "c") as one:
        put(one, "a", ["one"])
        with Catalogue(tmp_path / "." / "c") as two:
            put(two, "b", ["two"])
            assert one.texts("b") == ["two"] and two.texts("a") == ["one"]
        two.close()  # once more: that is not the other's
        with pytest.raises(RetrievalError, match="is closed"):
            two.get("a")
        assert len(one) == 2


def test_retrievers_in_threads_share_a_folder(tmp_path):
    failures = []

    def work(who):
        try:
            with Retriever.open(tmp_path, HashEmbedder()) as retriever:
                for number in range(8):
                    retriever.add(f"{who} {number}", [f"text {number} of {who}", "a text that all have"])
                    assert retriever.catalogue.texts(f"{who} {number}")[0] == f"text {number} of {who}"
                    assert all("text" in hit.text for hit in retriever.search("a text that all have", 5))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with Catalogue(tmp_path) as catalogue:
        assert len(catalogue) == 24 and catalogue.check() == []


def test_fork_is_survived(tmp_path, forked):
    """The child uses the very object of its parent, which is reading; what was begun before the fork is the parent's."""
    with Catalogue(tmp_path) as catalogue:
        put(catalogue, "a", ["one"])

        with catalogue.snapshot() as view:

            def child():
                with pytest.raises(StoreError, match="forked"):
                    view.get("a")
                assert catalogue.texts("a") == ["one"]
                put(catalogue, "b", ["two"])
                catalogue.close()
                return "ok"

            assert forked(child) == "ok"
            assert view.get("a") is not None and view.get("b") is None
        assert catalogue.texts("b") == ["two"] and catalogue.check() == []


def test_fork_while_threads_read_and_write(tmp_path, forked):
    with Catalogue(tmp_path) as catalogue:
        put(catalogue, "a", ["one"])
        stop = threading.Event()

        def work(who):
            number = 0
            while not stop.is_set():
                number += 1
                put(catalogue, who, [f"{number} of {who}"])
                assert catalogue.texts("a") == ["one"]

        threads = [threading.Thread(target=work, args=(who,)) for who in "xy"]
        for thread in threads:
            thread.start()
        try:
            for number in range(5):
                assert (
                    forked(lambda number=number: put(catalogue, f"c{number}", ["two"]) and len(catalogue) > 0) == "True"
                )
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert {f"c{number}" for number in range(5)} <= {document.source for document in catalogue}
        assert catalogue.check() == []


def test_a_fork_beside_a_search_and_a_change(tmp_path, forked):
    """The fork waits for the search, and the change for the fork: the search must not wait for the change."""
    assert forked(lambda: fork_beside(tmp_path), timeout_s=20) == "0"


def fork_beside(folder):
    with Retriever.open(folder, HashEmbedder()) as retriever, ThreadPoolExecutor(3) as threads:
        made = retriever.add("a", ["one"])
        inside, change, search = threading.Event(), threading.Event(), retriever._indexes.search
        gate = retriever.catalogue._environment.gate

        def slow(*asked):
            inside.set()
            assert change.wait(10)
            return search(*asked)

        retriever._indexes.search = slow
        found = threads.submit(retriever.search, "one")
        assert inside.wait(10)
        child = threads.submit(lambda: os.fork() or os._exit(0))
        while not gate._shut:  # until the fork waits
            time.sleep(0.001)
        applied = threads.submit(retriever._indexes.apply, made)
        time.sleep(0.1)
        change.set()
        assert [hit.source for hit in found.result()] == ["a"] and applied.result() is made
        return os.waitpid(child.result(), 0)[1]


@pytest.mark.parametrize("where", ["reranker", "embedder"])
def test_a_fork_does_not_wait_for_a_reranker_or_a_second_hop(tmp_path, forked, where):
    """Which may wait for it in turn: they may ask an engine, whose store is locked while the process is forked."""
    assert forked(lambda: fork_within(tmp_path, where), timeout_s=20) == "{0}"


def fork_within(folder, where):
    with Retriever.open(folder, HashEmbedder()) as retriever, ThreadPoolExecutor(1) as threads:
        retriever.add("a", ["one saw Ada Lovelace"])
        children, encode = [], retriever.embedder.encode_query

        def fork():
            children.append(threads.submit(lambda: os.fork() or os._exit(0)).result())

        def rerank(question, texts):
            fork()
            return [1.0 for _ in texts]

        def encoded(text):
            fork()
            return encode(text)

        if where == "embedder":
            retriever.embedder.encode_query = encoded
        hits = retriever.search("one", hops=2, rerank=rerank if where == "reranker" else None)
        assert [hit.source for hit in hits] == ["a"]
        return {os.waitpid(child, 0)[1] for child in children}


def test_closing_does_not_wait_for_a_reranker(tmp_path, forked):
    def work():
        retriever = Retriever.open(tmp_path, HashEmbedder())
        retriever.add("a", ["one"])
        with ThreadPoolExecutor(1) as threads, pytest.raises(StoreError, match="was closed meanwhile"):
            retriever.search("one", rerank=lambda question, texts: threads.submit(retriever.close).result() or [1.0])
        with Retriever.open(tmp_path, HashEmbedder()) as again:
            return [hit.source for hit in again.search("one")]

    assert forked(work, timeout_s=20) == "['a']"


def test_a_reranker_that_forks_in_its_own_thread(tmp_path, forked):
    """The child has no state of its parent's to go on with, and can search anew."""

    def work():
        with Retriever.open(tmp_path, HashEmbedder()) as retriever:
            retriever.add("a", ["one"])
            child = []
            try:
                retriever.search("one", rerank=lambda question, texts: child.append(os.fork()) or [1.0])
            except StoreError as error:
                assert child == [0] and "forked" in str(error)
                os._exit(7 if [hit.source for hit in retriever.search("one")] == ["a"] else 8)
            return os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1])

    assert forked(work, timeout_s=20) == "7"


def test_a_temporary_one_outlives_the_children_of_its_process(forked):
    with Catalogue() as catalogue:
        put(catalogue, "a", ["one"])
        assert forked(lambda: catalogue.close()) == "None"
        assert catalogue.texts("a") == ["one"]
    assert not catalogue.path.exists()


def closed_to_writers(folder):
    """Takes the rights to write from a folder that is there, from everybody but root."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in folder.parents[:4]:
        parent.chmod(0o755)


def unprivileged(work):
    """Does something as a user who may write nowhere."""
    if os.geteuid() == 0:
        os.setuid(65534)
    return work()


@pytest.mark.parametrize("left", ["all", "data"])
def test_a_folder_that_may_not_be_written_to_answers(tmp_path, forked, monkeypatch, left):
    """With its copies, and without them and LMDB's lock file."""
    monkeypatch.setattr("ragkv.retrieval.segments.SegmentedIndex.__init__.__defaults__", (None, 20))
    folder = tmp_path / "c"
    searches = ({}, {"hybrid": True}, {"where": {"even": True}, "hybrid": True}, {"namespace": "ada"}, {"hops": 2})

    def answers(retriever):
        return [[hit.text for hit in retriever.search("text 7 harbour", 99, **options)] for options in searches]

    with Retriever.open(folder, HashEmbedder()) as retriever:
        for number in range(3):
            texts = [f"text {place} of {number} harbour" for place in range(15)]
            retriever.add(f"{number}", texts, {"even": number % 2 == 0}, namespace="ada" if number == 2 else "")
        want = [sorted(found) for found in answers(retriever)]
        assert len(retriever.index._segments) == 1 and len(want[3]) == 15
    for path in () if left == "all" else set(folder.iterdir()) - {folder / "data.mdb"}:
        path.unlink()
    closed_to_writers(folder)
    before = sorted(folder.iterdir())

    def work():
        with Catalogue(folder) as catalogue:
            assert catalogue.check() == [] and catalogue.readonly
            with pytest.raises(StoreError, match="reading only"):
                catalogue.repair(HashEmbedder().encode_documents)
        with Retriever.open(folder, HashEmbedder()) as retriever:
            assert [sorted(found) for found in answers(retriever)] == want
            with pytest.raises(StoreError, match=f"{folder} is open for reading only"):
                retriever.add("b", ["three"])
            with pytest.raises(StoreError, match=f"{folder} is open for reading only"):
                retriever.remove("1")
            assert [sorted(found) for found in answers(retriever)] == want
        return sorted(folder.iterdir()) == before

    try:
        assert forked(lambda: unprivileged(work)) == "True"
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_deleted_or_replaced_under_a_running_process(tmp_path, replaced):
    folder = tmp_path / "c"
    with Catalogue(folder) as catalogue:
        put(catalogue, "a", ["one"])
        if replaced:
            with Catalogue(tmp_path / "other") as other:
                put(other, "b", ["two"])
            shutil.copy(tmp_path / "other" / "data.mdb", folder / "copy")
            os.replace(folder / "copy", folder / "data.mdb")
        else:
            shutil.rmtree(folder)
        with pytest.raises(StoreError, match="deleted or replaced"):
            put(catalogue, "c", ["three"])
        if replaced:
            with pytest.raises(StoreError, match="deleted or replaced"):
                Catalogue(folder)
        assert catalogue.texts("a") == ["one"]
    with Catalogue(folder) as catalogue:
        assert [document.source for document in catalogue] == (["b"] if replaced else [])
        put(catalogue, "c", ["three"])
        assert catalogue.check() == []
