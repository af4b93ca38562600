"""rm, forget, prune: what goes, what stays, and who is asked."""

import json
import re
from pathlib import Path

import pytest
import torch

from ragkv.cli import entries
from ragkv.retrieval import Catalogue, Reading
from ragkv.store import TieredStore
from ragkv.store.keys import ANY, label_of, path_key


def test_rm_by_id_and_by_document(run, left, key):
    code, out, err = run("rm", key(4).hex()[:8], "--yes")
    assert (code, err) == (0, "") and out.splitlines()[-1].startswith("removed 1 entry, ")
    assert left() == [0, 1, 2, 3, 9]
    assert run("rm", "b.md", key(9).hex(), "--yes", "--json")[0] == 0
    assert left() == [0, 1]


def test_rm_asks(run, left, monkeypatch):
    code, _, err = run("rm", "a.md")
    assert (code, err) == (1, "ragkv: nothing was removed; --yes removes without asking\n")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for said in ("n\n", "\n", "", "nonsense\n"):
        monkeypatch.setattr("sys.stdin.readline", lambda said=said: said)
        code, _, err = run("rm", "a.md")
        assert code == 1 and re.match(r"Remove 3 entries, [\d.]+ KiB\? \[y/N\] ", err)
    assert left() == [0, 1, 2, 3, 4, 9]
    monkeypatch.setattr("sys.stdin.readline", lambda: "y\n")
    assert run("rm", "a.md")[0] == 0
    assert left() == [2, 4, 9]


def test_rm_shows_the_first_of_many(run, left, monkeypatch):
    monkeypatch.setattr("ragkv.cli.entries._SHOWN", 2)
    code, out, _ = run("rm", "a.md", "b.md", "--dry-run")
    *listed, others, _ = out.splitlines()
    assert code == 0 and len(listed) == 1 + 2 and others == "... and 2 others"


def test_rm_dry_run(run, left, key):
    code, out, _ = run("rm", "a.md", "--dry-run")
    assert code == 0 and out.splitlines()[-1].startswith("would remove 3 entries, ")
    code, out, _ = run("rm", "a.md", "--dry-run", "--json")
    said = json.loads(out)
    assert said["dry_run"] and set(said["removed"]) == {key(number).hex() for number in (0, 1, 3)}
    assert left() == [0, 1, 2, 3, 4, 9]


@pytest.mark.parametrize("target", ["c.md", "ffff", "abc", "0", "../a.md"])
def test_rm_what_is_not_there(run, left, target):
    code, out, err = run("rm", "b.md", target, "--yes")
    assert (code, out) == (1, "") and "nothing was removed" in err
    assert left() == [0, 1, 2, 3, 4, 9]


def test_rm_of_several_that_begin_so(run, left, monkeypatch):
    monkeypatch.setattr("ragkv.cli.rm._ID", re.compile("[0-9a-f]*"))
    code, _, err = run("rm", "", "--yes")
    assert code == 1 and "6 entries begin with" in err
    assert len(left()) == 6


def test_prune_orphans_and_filters(run, left):
    code, out, _ = run("prune", "--orphans", "--yes")
    assert code == 0 and "removed 1 entry" in out
    assert left() == [0, 1, 2, 3, 9], "what has no label is nobody's orphan"
    assert run("prune", "--filter", "space=other*", "-y")[0] == 0
    assert left() == [0, 1, 2, 3]
    assert run("prune", "--filter", "age>7d", "-y")[0] == 0
    assert run("prune", "--orphans", "--filter", "tokens=30", "-y")[0] == 0
    assert left() == [0, 1, 2, 3]


def test_prune_to_a_size_passes_over_pinned(run, left, folder, key):
    with TieredStore(folder / "kv", cpu_bytes=0) as store:
        store.pin(key(0))
    code, _, err = run("prune", "--max-size", "0", "--dry-run")
    assert code == 0 and err == "1 pinned entry passed over\n"
    sizes = {entry["id"]: entry["bytes"] for entry in json.loads(run("ls", "--json")[1])["entries"]}
    room = sum(sizes.values()) - 1
    assert run("prune", "--max-size", room, "-y")[0] == 0
    assert len(left()) == 5
    assert run("prune", "--max-size", "0", "-y")[0] == 0
    assert left() == [0]


def test_prune_removes_what_is_idle_longest(run, left, folder, key):
    with TieredStore(folder / "kv", cpu_bytes=0) as store:
        for number in (1, 2, 3, 4, 9):
            store.get(key(number))
    sizes = [entry["bytes"] for entry in json.loads(run("ls", "--json")[1])["entries"]]
    assert run("prune", "--max-size", sum(sizes) - 1, "-y")[0] == 0
    assert left() == [1, 2, 3, 4, 9]


@pytest.fixture
def documents(folder):
    """The documents that are left, by name."""

    def documents():
        with Catalogue(folder / "documents") as catalogue:
            return sorted(Path(document.source).name for document in catalogue)

    return documents


def test_what_is_added_meanwhile_is_no_orphan(run, left, folder, key, kv, monkeypatch):
    """A document and its KV come between the looks at documents and at KV, in whichever order these are."""
    real = entries._places

    def places(*args):
        found = real(*args)
        with Catalogue(folder / "documents") as catalogue, TieredStore(folder / "kv", cpu_bytes=0) as store:
            reading = Reading("ab" * 32, [key(5)], b"")
            catalogue.put("new.md", ["new"], lambda texts: torch.ones(len(texts), 4).numpy(), reading=reading)
            store.put(key(5), kv(5), space="model", label="a document")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(entries, "_places", places)
        assert run("prune", "--orphans", "--yes")[0] == 0
    assert 5 in left()


def test_forget_removes_documents_with_their_kv(run, left, documents):
    code, out, _ = run("forget", "a.md", "--dry-run")
    assert code == 0 and out.splitlines()[-1].startswith("would remove 1 document, 2 entries, ")
    assert run("forget", "a.md")[0] == 1, "nobody can be asked"
    assert (left(), documents()) == ([0, 1, 2, 3, 4, 9], ["a.md", "b.md"])
    code, out, _ = run("forget", "a.md", "--yes")
    assert code == 0 and out.splitlines()[-1].startswith("removed 1 document, 2 entries, ")
    assert (left(), documents()) == ([2, 3, 4, 9], ["b.md"]), "what b.md also says stays"
    code, out, _ = run("forget", "b.md", "--yes", "--json")
    assert code == 0 and [Path(name).name for name in json.loads(out)["documents"]] == ["b.md"]
    assert (left(), documents()) == ([4, 9], [])
    assert run("stats")[0] == 0


def test_forget_what_is_not_there(run, left, documents):
    code, out, err = run("forget", "b.md", "c.md", "--yes")
    assert (code, out) == (1, "") and "no document is called 'c.md'" in err
    assert documents() == ["a.md", "b.md"] and len(left()) == 6


def test_forget_without_kv(run, folder, tmp_path):
    with Catalogue(tmp_path / "bare" / "documents") as catalogue:
        catalogue.put("x", ["one"], lambda many: torch.ones(len(many), 4).numpy())
    code, out, _ = run("forget", "x", "--yes", "--path", tmp_path / "bare")
    assert code == 0 and out.splitlines()[-1] == "removed 1 document, 0 entries, 0 B"
    assert not (tmp_path / "bare" / "kv").exists()


def test_forget_is_of_one_namespace(run, left, folder, tmp_path, key, kv):
    """The same name in another one, and its KV, stay; the folder's own is meant where none is named."""
    with Catalogue(folder / "documents") as catalogue, TieredStore(folder / "kv", cpu_bytes=0) as store:
        reading = Reading("cd" * 32, [key(8)], b"")
        vectors = lambda many: torch.ones(len(many), 4).numpy()  # noqa: E731
        catalogue.put(str(tmp_path / "a.md"), ["of ada"], vectors, reading=reading, namespace="ada")
        store.put(key(8), kv(8), space="model", cost_s=0.1, label="a document")
    code, out, _ = run("docs")
    assert code == 0 and "namespace" in out and out.count("a.md") == 2 and " ada " in out
    listed = json.loads(run("docs", "--json")[1])["documents"]
    assert [item["namespace"] for item in listed] == ["", "ada", ""]
    assert run("forget", "b.md", "--namespace", "ada", "--yes")[0] == 1
    assert run("forget", "a.md", "--yes")[0] == 0
    with Catalogue(folder / "documents") as catalogue:
        assert [(each.namespace, catalogue.texts(each.source, each.namespace)[0]) for each in catalogue] == [
            ("ada", "of ada"),
            ("", "beta one"),
        ]
    assert left() == [2, 3, 4, 8, 9], "3 is shared with b.md"
    assert run("forget", "a.md", "--namespace", "ada", "--yes")[0] == 0
    assert left() == [2, 3, 4, 9]


def test_what_was_computed_of_a_document_or_behind_it_goes_with_it(run, folder, key, kv):
    """Pieces under a path: of the second document behind the first, of the second alone, of more than are named, of none."""
    labels = {"both": label_of([key(0), key(2)]), "second": label_of([key(2)]), "any": ANY, "none": ""}
    computed = {name: path_key("space", [number], b"path") for number, name in enumerate(labels)}
    with TieredStore(folder / "kv", cpu_bytes=0) as store:
        for name, label in labels.items():
            store.put(computed[name], kv(7), label=label)

    def there():
        with TieredStore(folder / "kv", cpu_bytes=0) as store:
            return [name for name, key in computed.items() if key in store]

    lines = [line for line in run("ls")[1].splitlines() if line.endswith(" path")]
    assert sorted(line.split()[1] for line in lines) == ["(none)", "(none)", "b.md", "b.md"]  # by what they are of
    assert run("prune", "--orphans", "--yes")[0] == 0 and there() == list(labels)
    assert run("forget", "a.md", "--dry-run", "--yes")[0] == 0 and there() == list(labels)
    assert run("forget", "a.md", "--yes")[0] == 0
    assert there() == ["second", "none"]
    assert run("rm", "b.md", "--yes")[0] == 0
    assert there() == ["none"]
