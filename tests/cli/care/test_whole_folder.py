"""verify, stats, compact, export, import: a folder as a whole."""

import json
import os
import re
import signal
import subprocess

import lmdb
import numpy as np
import pytest

from ragkv import bundled
from ragkv.retrieval import Catalogue, FaissIndex
from ragkv.retrieval.words import WordIndex
from ragkv.store import TieredStore


class Ones:
    name, dimension, fingerprint = "ones", 4, "ones/4"

    def encode_documents(self, texts):
        return np.ones((len(texts), self.dimension), np.float32)


def test_verify_finds_and_repairs(run, left, folder, key, spoil):
    code, out, err = run("verify")
    assert (code, err) == (0, "") and re.fullmatch(r"6 records, [\d.]+ KiB read: nothing is damaged\n", out)
    spoil(2)
    code, out, err = run("verify")
    assert code == 1 and out.startswith(key(2).hex()[:12]) and "1 damaged\n" in out and "--repair" in err
    assert left() == [0, 1, 2, 3, 4, 9]
    code, out, _ = run("verify", "--repair", "--json")
    said = json.loads(out)
    assert (code, said["checked"], said["dropped"]) == (1, 6, 1)
    assert [item["id"] for item in said["damaged"]] == [key(2).hex()]
    assert left() == [0, 1, 3, 4, 9]
    assert run("verify")[0] == 0


def test_verify_repairs_a_file_whose_pages_are_damaged(run, folder):
    data = folder / "kv" / "data.mdb"
    raw = bytearray(data.read_bytes())
    raw[:8192] = bytes(8192)
    data.write_bytes(raw)
    code, out, err = run("verify")
    assert code == 1 and "the file: " in out and "--repair" in err
    assert run("verify", "--repair")[0] == 1
    assert run("verify")[0] == 0


def test_verify_saves_documents_of_a_file_that_was_cut_short(run, folder, monkeypatch):
    data, embed = folder / "documents" / "data.mdb", Ones().encode_documents
    monkeypatch.setattr("ragkv.retrieval.offline_embedder", Ones)  # nothing says any more which one it was
    with Catalogue(folder / "documents") as catalogue:
        want = {document.source: catalogue.texts(document.source) for document in catalogue}
        catalogue.put("large", ["a long text " * 40_000], embed)
        for number in range(5):  # what every change moves goes to pages that became free
            catalogue.put("small", [f"text {number}"], embed)
    os.truncate(data, data.read_bytes().index(b"a long text a long text") // 4096 * 4096)
    code, out, _ = run("verify")
    assert code == 1 and "documents: the file: " in out
    code, out, _ = run("verify", "--repair")
    assert code == 1 and "saved into a new file" in out
    assert "documents: large: damaged and deleted, add it again" in out
    with Catalogue(folder / "documents") as catalogue:
        assert {source: catalogue.texts(source) for source in want} == want
        assert catalogue.texts("small") == ["text 4"]
    assert run("verify")[0] == 0


def spoil_documents(folder, database, number):
    """Changes a bit of a record of the documents."""
    with lmdb.open(str(folder / "documents"), max_dbs=8, map_size=1 << 30) as env, env.begin(write=True) as txn:
        db = env.open_db(database, txn)
        key, record = list(txn.cursor(db))[number]
        txn.put(key, record[:20] + bytes([record[20] ^ 1]) + record[21:], db=db)


def sources(folder):
    with Catalogue(folder / "documents") as catalogue:
        return [os.path.basename(document.source) for document in catalogue.documents()]


@pytest.mark.parametrize("database", [b"documents", b"passages"])
def test_verify_repairs_documents(run, folder, database):
    """One record of one document: the others stay, and no vector has to be computed."""
    before = sources(folder)
    spoil_documents(folder, database, 0)
    code, out, err = run("verify")
    assert code == 1 and "is damaged" in out and ": nothing is damaged" not in out and "--repair" in err
    code, out, _ = run("verify", "--repair", "--json")
    said = json.loads(out)
    assert code == 1 and said["documents"] and len(said["repaired"]) == 1
    assert "damaged and deleted, add it again" in said["repaired"][0]
    assert run("verify")[0] == 0
    left = sources(folder)
    assert len(left) == 1 and set(left) < set(before)


def test_verify_takes_no_page_for_damaged_that_another_process_has_just_written(run, folder, monkeypatch):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with Catalogue(folder / "documents"):
            os.write(writer, b"x")
            signal.pause()
    try:
        os.read(reader, 1)
        monkeypatch.setattr("ragkv.cli.verify.problems", lambda place: ["page 3 seems wrong"])
        assert run("verify")[0] == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    code, out, _ = run("verify")
    assert code == 1 and "documents: the file: page 3 seems wrong" in out, "nobody writes: so it is"


def test_verify_computes_vectors_again(run, folder, monkeypatch):
    with Catalogue(folder / "documents") as catalogue:
        catalogue.require("embedder", "ones/4", "ones")
    spoil_documents(folder, b"vectors", 2)
    monkeypatch.setattr(Ones, "fingerprint", "other/4")
    monkeypatch.setattr("ragkv.retrieval.offline_embedder", Ones)
    code, out, _ = run("verify", "--repair")
    assert code == 1 and "nothing was repaired: " in out and "was made with the embedder ones (ones/4)" in out
    monkeypatch.setattr(Ones, "fingerprint", "ones/4")
    monkeypatch.setattr(Ones, "dimension", 3)
    code, out, _ = run("verify", "--repair")
    assert code == 1 and "nothing was repaired: the embedder gives vectors of 3 numbers" in out
    monkeypatch.setattr(Ones, "dimension", 4)
    code, out, _ = run("verify", "--repair")
    assert code == 1 and "passage 2: its vector was computed again" in out
    assert run("verify")[0] == 0 and len(sources(folder)) == 2


def test_verify_looks_at_what_is_made_of_the_documents(run, folder):
    """Index and words: what SQLite itself does not notice, too."""
    place = folder / "documents"
    with Catalogue(place) as catalogue, catalogue.snapshot() as view:
        index, words = FaissIndex(4), WordIndex(place / "words.sqlite")
        index.add(view.passage_ids(), view.vectors(view.passage_ids()))
        index.save(place / "index.safetensors", view.state)
        assert len(words.search(view, "alpha", 9)) == 2
        words.close()
    assert run("verify")[0] == 0
    for name in ("index.safetensors", "words.sqlite"):
        file = place / name
        data = bytearray(file.read_bytes())
        at = data.rindex(b"beta") if name == "words.sqlite" else len(data) - 1
        data[at] ^= 1
        file.write_bytes(data)
        code, out, _ = run("verify")
        assert code == 1 and f"documents: {name}: " in out
        code, out, _ = run("verify", "--repair")
        assert code == 1 and f"{name}: removed" in out and not file.exists()
        assert run("verify")[0] == 0


def test_stats_show_what_was_done(run, folder, key, kv):
    code, out, _ = run("stats", "--json")
    done = json.loads(out)["history"]
    assert code == 0
    assert (done["hits"], done["misses"], done["puts"]) == ({"gpu": 0, "cpu": 0, "disk": 1}, 1, 6)
    assert done["evictions"] == {}
    for stage in ("encode", "write", "find", "load"):
        assert 0 < done["latency_ms"][stage]["median"] <= done["latency_ms"][stage]["p95"]
    with TieredStore(folder / "kv", cpu_bytes=0, disk_bytes=30_000) as store:
        store.put(key(20), kv(20))
        store.get(key(20))
    done = json.loads(run("stats", "--json")[1])["history"]
    assert done["hits"]["disk"] == 2 and done["puts"] == 7 and done["evictions"]["disk"]["budget"] >= 1
    out = run("stats")[1]
    assert "2 documents, 5 passages" in out
    assert re.search(r"from disk +2\n", out) and re.search(r"disk +budget +\d", out)
    assert re.search(r"load +2 +[\d.]+ ms +[\d.]+ ms", out)


def test_compact(run, folder):
    code, out, _ = run("compact", "--json")
    said = json.loads(out)
    assert code == 0 and 0 < said["after_bytes"] <= said["before_bytes"]
    assert run("verify")[0] == 0
    with TieredStore(folder / "kv", cpu_bytes=0):
        code, _, err = run("compact")
        assert code == 1 and "open in this process" in err


def test_export_and_import_kv_alone(run, left, tmp_path, key):
    code, out, _ = run("export", "kv.tar", "--kv-only")
    assert code == 0 and out.startswith("6 records written to kv.tar, ")
    code, _, err = run("export", "kv.tar", "--kv-only")
    assert code == 1 and "--force" in err
    assert run("export", "kv.tar", "--kv-only", "--force", "--filter", "document=a.md")[1].startswith(
        "3 records written"
    )
    assert run("rm", "a.md", "-y")[0] == 0 and left() == [2, 4, 9]
    code, out, _ = run("import", "kv.tar", "--json")
    assert code == 0 and json.loads(out)["records"] == 3
    assert left() == [0, 1, 2, 3, 4, 9]
    out = run("import", "kv.tar", "--kv-only")[1]
    assert out.startswith("0 records taken in") and out.endswith("already there: 3 records\n"), "what is there stays"
    assert run("import", "kv.tar", "--path", "elsewhere")[1].startswith("0 documents, 3 records taken in")
    with TieredStore(tmp_path / "elsewhere" / "kv", cpu_bytes=0) as store:
        assert store.get(key(0)) is not None and not store.contains(key(2))
    data = (tmp_path / "kv.tar").read_bytes()
    (tmp_path / "kv.tar").write_bytes(data[:600])
    code, out, err = run("import", "kv.tar", "--path", "third")
    assert (code, out, err.count("\n")) == (1, "", 1) and not (tmp_path / "third").exists()


def test_export_and_import_a_folder(run, left, tmp_path, folder):
    code, out, _ = run("export", "all.tar")
    assert code == 0 and out.startswith("2 documents, 6 records written to all.tar, ")
    code, out, err = run("import", "all.tar", "--path", "elsewhere")
    assert (code, err) == (0, "") and out.startswith("2 documents, 6 records taken in from all.tar, ")
    with Catalogue(tmp_path / "elsewhere" / "documents") as there, Catalogue(folder / "documents") as here:
        assert {document.source: there.texts(document.source) for document in there} == {
            document.source: here.texts(document.source) for document in here
        }
    assert run("ls", "-q", "--path", "elsewhere")[1] == run("ls", "-q")[1]
    assert run("import", "all.tar", "--path", "third", "--kv-only")[1].startswith("6 records taken in")
    assert not (tmp_path / "third" / "documents").exists()

    assert run("export", "some.tar", "--filter", "document=a.md")[1].startswith("1 document, 3 records written")
    with Catalogue(folder / "documents") as catalogue:
        catalogue.put(str(tmp_path / "a.md"), ["now another"], lambda texts: np.ones((len(texts), 4), np.float32))
    code, out, err = run("import", "some.tar", "--json")
    said = json.loads(out)
    assert (code, err, said["documents"], said["kept"]) == (0, "", 0, [str(tmp_path / "a.md")])
    code, out, err = run("import", "some.tar")
    assert err.startswith("kept a.md: another version of it is here, --replace")
    assert out.startswith("0 documents, 0 records taken in from some.tar, ") and out.endswith(
        "already there: 1 record\n"
    )
    code, out, err = run("import", "some.tar", "--replace")
    assert (code, err) == (0, "") and out.startswith("1 document, 0 records taken in")
    code, out, _ = run("import", "some.tar")
    assert code == 0 and out.startswith("0 documents, 0 records taken in from some.tar, ")
    assert out.endswith("; already there: 1 document, 3 records\n")
    said = json.loads(run("import", "some.tar", "--json")[1])
    assert [said[name] for name in ("documents", "documents_there", "records", "records_there")] == [0, 1, 0, 3]
    with pytest.raises(SystemExit):
        run("import", "some.tar", "--all", "--kv-only")


@pytest.mark.parametrize("more", [[], ["--kv-only"], ["--json", "--force"]])
def test_an_export_of_nothing_writes_nothing(run, tmp_path, more):
    (tmp_path / "all.tar").write_text("what was there")
    code, out, err = run("export", "all.tar", "-f", "document=c.md", *more)
    assert (code, out, err.count("\n")) == (1, "", 1) and ("holds for no entry" in err or "--force" in err)
    assert (tmp_path / "all.tar").read_text() == "what was there"
    code, out, err = run("export", "none.tar", "-f", "document=c.md", *more)
    assert (code, out) == (1, "") and err == (
        "ragkv: --filter holds for no entry, and none.tar was not written: 'ragkv ls' lists them, and takes it too\n"
    )
    with Catalogue(tmp_path / "bare" / "documents"):
        pass
    code, out, err = run("export", "none.tar", "--path", "bare")
    assert (code, out, err) == (1, "", "ragkv: there is nothing to export; none.tar was not written\n")
    assert not (tmp_path / "none.tar").exists()


@pytest.mark.parametrize("more", [[], ["--filter", "size>0"]])
def test_export_passes_over_what_is_damaged(run, folder, key, spoil, tmp_path, more):
    with Catalogue(folder / "documents") as catalogue:
        document, _ = catalogue.documents()
        with catalogue._environment.transaction(write=True) as txn:
            name = bytes.fromhex(document.id)
            txn.put("documents", name, txn.get("documents", name)[:-3] + b"???")
    spoil(2)
    code, out, err = run("export", "all.tar", *more)
    assert code == 1 and out.startswith("1 document, 5 records written to all.tar, ")
    assert err.endswith("ragkv: 2 damaged and not in the file: 'ragkv verify' says more\n")
    code, out, _ = run("export", "again.tar", *more, "--json")
    assert code == 1 and json.loads(out)["damaged"] == [f"document {document.id}", key(2).hex()]
    assert run("import", "all.tar", "--path", "elsewhere")[0] == 0
    with Catalogue(tmp_path / "elsewhere" / "documents") as catalogue:
        assert [document.source for document in catalogue] == [str(tmp_path / "b.md")]


@pytest.mark.parametrize("more", [[], ["--kv-only"]])
def test_import_says_what_a_file_is_that_is_none_of_ours(run, tmp_path, more):
    run("export", "all.tar")
    whole = (tmp_path / "all.tar").read_bytes()
    (tmp_path / "notes.txt").write_text("Dear all,\nwe meet on Monday.")
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    for name, said in {
        "notes.txt": "notes.txt is no archive that 'ragkv export' wrote: it is a text that begins with 'Dear all,",
        "cut.tar": "cut.tar was cut short; taken in: ",
        "home": "home is a folder, no file",
        "missing.tar": "there is no file missing.tar",
    }.items():
        code, out, err = run("import", name, "--path", "elsewhere", *more)
        assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith(f"ragkv: {said}")


def test_a_folder_of_kv_alone(run, tmp_path, key, kv):
    with TieredStore(tmp_path / "alone", cpu_bytes=0) as store:
        store.put(key(1), kv(1))
    assert run("ls", "-q", "--path", "alone")[1].split() == [key(1).hex()]
    assert run("verify", "--path", "alone")[0] == run("compact", "--path", "alone")[0] == 0
    assert run("rm", key(1).hex(), "-y", "--path", "alone")[0] == 0
    assert run("ls", "-q", "--path", "alone")[1] == ""


def test_a_real_folder_in_real_processes(warm, tmp_path):
    """add with the bundled model, then what its folder shows, each in a process of its own."""

    def ragkv(*argv):
        done = subprocess.run([*warm, "-m", "ragkv.cli", *argv], capture_output=True, text=True, cwd=tmp_path)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout

    (tmp_path / "clearport.md").write_text(bundled.documents()["clearport.md"])
    assert ragkv("add", "clearport.md")[0] == 0
    code, out = ragkv("ls", "--json")
    found = json.loads(out)["entries"]
    assert code == 0
    assert [entry["places"] for entry in found] == [
        [{"source": str(tmp_path / "clearport.md"), "position": number}] for number in range(len(found))
    ]
    costs = [entry["cost_s"] / entry["tokens"] for entry in found]
    assert len(found) > 1 and all(0 < cost < 1 for cost in costs)
    code, out = ragkv("rm", "clearport.md", "--yes")
    assert code == 0 and f"removed {len(found)} entries" in out
    assert ragkv("ls", "--quiet") == (0, "")
