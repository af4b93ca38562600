"""docs, and what forget and rm understand by a document."""

import json
from pathlib import Path

import pytest
import torch

from ragkv.cli import show
from ragkv.retrieval import Catalogue
from ragkv.store import TieredStore


@pytest.fixture
def many(folder, tmp_path):
    """Three more documents, in folders."""
    with Catalogue(folder / "documents") as catalogue:
        for name in ("notes/one.md", "notes/deep/two.txt", "papers/one.md"):
            catalogue.put(str(tmp_path / name), [name], lambda texts: torch.ones(len(texts), 4).numpy())


@pytest.fixture
def documents(folder, tmp_path):
    """The documents that are left, by path."""

    def documents():
        with Catalogue(folder / "documents") as catalogue:
            return [str(Path(document.source).relative_to(tmp_path)) for document in catalogue.documents()]

    return documents


def test_docs(run, folder, key, tmp_path):
    with TieredStore(folder / "kv", cpu_bytes=0) as store:
        store.pin(key(0))
        sizes = store.sizes([key(number) for number in (0, 1, 3)])
    code, out, err = run("docs")
    assert code == 0 and err.startswith("Found 2 documents, ") and " of KV on disk." in err
    head, first, second = (line.split() for line in out.splitlines())
    assert head == ["document", "passages", "tokens", "KV", "on", "disk"]
    assert (
        first[:2] == ["a.md", "3"] and first[-1] == "pinned" and second[:2] == ["b.md", "2"] and "pinned" not in second
    )
    code, out, err = run("docs", "--json")
    listed = json.loads(out)["documents"]
    assert (code, err) == (0, "")
    assert listed[0] == {
        "source": str(tmp_path / "a.md"),
        "passages": 3,
        "tokens": None,
        "kv_bytes": sizes,
        "pinned": True,
        "metadata": {},
        "namespace": "",
    }


def test_what_documents_share_is_counted_once_in_the_whole(run, left, folder, key):
    """a.md and b.md share a passage; entries 4 and 9 belong to no document, and only stats count them."""
    with TieredStore(folder / "kv", cpu_bytes=0) as store:
        shared, whole = store.sizes([key(3)])["disk"], store.sizes(map(key, range(4)))["disk"]
        orphans = store.sizes([key(4), key(9)])["disk"]
    said = json.loads(run("docs", "--json")[1])
    assert sum(document["kv_bytes"]["disk"] for document in said["documents"]) == whole + shared
    assert said["kv_bytes"] == {"disk": whole}
    assert json.loads(run("stats", "--json")[1])["store"]["tiers"]["disk"]["bytes"] == whole + orphans
    assert run("docs")[2] == (
        f"Found 2 documents, {show.size(whole)} of KV on disk. What several documents share counts for each of them above: "
        f"{show.size(shared)} more.\n"
    )
    run("forget", "b.md", "--yes")
    assert run("docs")[2].endswith(" of KV on disk.\n")


def test_docs_without_kv_or_documents(run, tmp_path):
    with Catalogue(tmp_path / "bare" / "documents"):
        pass
    code, out, err = run("docs", "--path", tmp_path / "bare")
    assert (code, out, err) == (0, "", "Found 0 documents, 0 B of KV on disk.\n")
    assert not (tmp_path / "bare" / "kv").exists()
    code, _, err = run("docs", "--path", tmp_path / "none")
    assert code == 1 and "no documents in" in err and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("targets", "left"),
    [
        (["notes"], ["a.md", "b.md", "papers/one.md"]),
        (["notes/"], ["a.md", "b.md", "papers/one.md"]),
        (["*.md"], ["notes/deep/two.txt"]),
        (["*/one.md", "a.md"], ["b.md", "notes/deep/two.txt"]),
        (["./notes/one.md", "notes"], ["a.md", "b.md", "papers/one.md"]),
        (["."], []),
    ],
)
def test_forget_what_people_mean(run, many, documents, tmp_path, targets, left):
    before = documents()
    code, out, _ = run("forget", *targets, "--dry-run")
    gone = [name for name in before if name not in left]
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:-1]] == gone, "what goes is named"
    assert documents() == before
    code, out, _ = run("forget", *targets, "--yes")
    assert code == 0 and out.splitlines()[-1].startswith(f"removed {len(gone)} document")
    assert documents() == left
    assert run("verify")[0] == 0


def test_forget_ends_what_was_cut_short(run, left, folder, tmp_path):
    with Catalogue(folder / "documents") as catalogue:
        gone = catalogue.remove(str(tmp_path / "a.md")).unused  # and killed, before their KV go
        assert catalogue.unused() == list(gone) and left() == [0, 1, 2, 3, 4, 9]
    assert run("forget", "b.md", "--yes")[0] == 0
    assert left() == [4, 9]
    with Catalogue(folder / "documents") as catalogue:
        assert catalogue.unused() == []


def test_forget_names_what_is_near(run, many, documents, tmp_path):
    before = documents()
    code, out, err = run("forget", "a.md", "two.txt", "--yes")
    assert (code, out) == (1, "")
    assert err == (
        f"ragkv: no document is called 'two.txt': did you mean '{tmp_path}/notes/deep/two.txt'? 'ragkv docs' lists them; "
        "nothing was removed\n"
    )
    code, _, err = run("forget", "one.md", "--yes")
    assert code == 1 and "notes/one.md' or '" in err and "papers/one.md'" in err
    code, _, err = run("forget", "", "--yes")
    assert code == 1 and documents() == before


def test_rm_understands_the_same(run, left, tmp_path):
    assert run("rm", "*.md", "--yes")[0] == 0
    assert left() == [4, 9]
    code, _, err = run("rm", "a.mdx", "--yes")
    assert (
        code == 1 and "no entry's id begins with these digits (4 at least), and no document is called 'a.mdx': " in err
    )
