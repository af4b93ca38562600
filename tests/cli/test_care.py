"""ls, rm, prune, verify, stats, compact, export, import: on a folder with documents and their KV."""

import json
import re
import subprocess
import sys

import pytest
import torch

from ragkv import bundled
from ragkv.chunk import ChunkKV
from ragkv.cli import main
from ragkv.cli.arguments import parser
from ragkv.retrieval import Catalogue
from ragkv.retrieval.records import text_key
from ragkv.store import TieredStore, chunk_key

TEXTS = {"a.md": ["alpha one", "alpha two", "shared"], "b.md": ["beta one", "shared"]}


def key_of(number):
    return chunk_key("space", [number], b"")


def kv_of(number, tokens=30):
    torch.manual_seed(number)
    return ChunkKV([torch.randn(2, tokens, 8)], [torch.randn(2, tokens, 8)], 0)


@pytest.fixture
def folder(tmp_path):
    """Two documents of five passages, one of them an orphan's, and one entry that belongs to no document at all."""
    path = tmp_path / "home" / "default"
    with Catalogue(path / "documents") as catalogue:
        for source, texts in TEXTS.items():
            catalogue.put(str(tmp_path / source), texts, lambda many: torch.ones(len(many), 4).numpy())
    texts = ["alpha one", "alpha two", "beta one", "shared", "a text that no document has"]
    with TieredStore(path / "kv", cpu_bytes=0, codec="int8") as store:
        for number, text in enumerate(texts):
            kv = kv_of(number, tokens=30 + number)
            store.put(key_of(number), kv, space="model", cost_s=0.1, label=text_key(text).hex())
        store.put(key_of(9), kv_of(9), space="other model", cost_s=0.1)
        store.get(key_of(1))
        store.get(key_of(404))
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGKV_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys, folder):
    """Runs a command; its exit code, stdout and stderr."""

    def run(*argv):
        code = main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def left(run):
    """Which entries are left, by number."""

    def left():
        _, out, _ = run("ls", "--quiet")
        return sorted(number for number in range(10) if key_of(number).hex() in out.split())

    return left


def spoil(folder, number):
    with TieredStore(folder / "kv", cpu_bytes=0) as store:
        env = store._disk.environment
        with env.write() as txn:
            data = bytearray(txn.get(key_of(number) + bytes(4), db=env.db(b"segments")))
            data[17] ^= 8
            txn.put(key_of(number) + bytes(4), bytes(data), db=env.db(b"segments"))


def test_ls_shows_documents_and_passages(run):
    code, out, err = run("ls")
    lines = [re.split(r" {2,}", line.strip()) for line in out.splitlines()]
    assert code == 0
    assert lines[0] == ["id", "document", "passage", "tokens", "size", "tier", "codec", "age", "idle", "hits"]
    assert [line[1:4] for line in lines[1:4]] == [["a.md", "1", "30"], ["a.md", "2", "31"], ["a.md", "3", "33"]]
    assert [line[1:3] for line in lines[4:]] == [["b.md", "1"], ["(none)", "30"], ["(orphan)", "34"]] or [
        line[1:3] for line in lines[4:]
    ] == [["b.md", "1"], ["(orphan)", "34"], ["(none)", "30"]]
    assert {line[-4] for line in lines[1:]} == {"int8"} and {line[-5] for line in lines[1:]} == {"disk"}
    assert [line[-1] for line in lines[1:4]] == ["0", "1", "0"]
    assert key_of(1).hex().startswith(lines[2][0])
    assert re.fullmatch(r"Found 6 entries, [\d.]+ KiB on disk\.\n", err)


def test_ls_as_json(run, tmp_path):
    code, out, err = run("ls", "--json")
    found = json.loads(out)
    assert (code, err, found["found"], len(found["entries"])) == (0, "", 6, 6)
    shared = next(entry for entry in found["entries"] if entry["tokens"] == 33)
    assert shared["places"] == [
        {"source": str(tmp_path / "a.md"), "position": 2},
        {"source": str(tmp_path / "b.md"), "position": 1},
    ]
    assert (shared["tier"], shared["codec"], shared["space"], shared["expires_s"]) == ("disk", "int8", "model", None)
    assert found["bytes"] == sum(entry["bytes"] for entry in found["entries"])
    assert [entry["orphan"] for entry in found["entries"]].count(True) == 1


@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        (["tokens>31"], [2, 3, 4]),
        (["tokens>=31", "tokens<34"], [1, 2, 3]),
        (["hits=1"], [1]),
        (["hits!=1", "space=model"], [0, 2, 3, 4]),
        (["document=a.md"], [0, 1, 3]),
        (["document=*.md"], [0, 1, 2, 3]),
        (["document!=*.md"], [4, 9]),
        (["space=other*"], [9]),
        (["codec=raw"], []),
        (["age<1h", "idle<1d", "cost<=1s"], [0, 1, 2, 3, 4, 9]),
        (["age>7d"], []),
        (["size<1GiB"], [0, 1, 2, 3, 4, 9]),
        (["size>1MB"], []),
        ([f"id={key_of(2).hex()[:20]}*"], [2]),
    ],
)
def test_filters(run, filters, numbers):
    arguments = [part for text in filters for part in ("--filter", text)]
    code, out, _ = run("ls", "--quiet", *arguments)
    assert code == 0
    assert sorted(out.split()) == sorted(key_of(number).hex() for number in numbers)


def test_sort_and_limit(run):
    assert run("ls", "-q", "--sort", "tokens", "--limit", 2)[1].split() == [key_of(4).hex(), key_of(3).hex()]
    assert run("ls", "-q", "--sort", "tokens:asc")[1].split()[-1] == key_of(4).hex()
    assert run("ls", "-q", "--sort", "id")[1].split() == sorted(key_of(number).hex() for number in (0, 1, 2, 3, 4, 9))
    assert "6 entries, 1 shown" in run("ls", "--limit", 1)[2]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["ls", "--filter", "weight>3"], "fields: size, tokens"),
        (["ls", "--filter", "size"], "a filter is FIELD"),
        (["ls", "--filter", "size>big"], "a size, as 500MB or 2GiB; got 'big'".replace(";", ",")),
        (["ls", "--filter", "age>7 parsecs"], "a time, as 12h or 7d"),
        (["ls", "--filter", "codec>raw"], "compared with = or !="),
        (["ls", "--sort", "size:up"], "FIELD:asc or FIELD:desc"),
        (["ls", "--limit", "-1"], "whole number"),
        (["rm"], "ID|DOCUMENT"),
        (["prune"], "say what goes: --filter, --orphans or --max-size"),
        (["prune", "--max-size", "some"], "a size"),
        (["export"], "FILE"),
        (["verify", "--fix"], "unrecognized arguments"),
    ],
)
def test_usage_errors_exit_with_2(folder, argv, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_sizes_and_times():
    arguments = parser().parse_args(["prune", "--max-size", "1.5GiB", "-f", "idle>2w"])
    assert arguments.max_size == 3 << 29
    assert arguments.filters[0].value == 14 * 86_400
    assert parser().parse_args(["import", "x", "--disk-size", "2GB"]).disk_size == 2_000_000_000


def test_rm_by_id_and_by_document(run, left):
    code, out, err = run("rm", key_of(4).hex()[:8], "--yes")
    assert (code, err) == (0, "") and out.splitlines()[-1].startswith("removed 1 entry, ")
    assert left() == [0, 1, 2, 3, 9]
    assert run("rm", "b.md", key_of(9).hex(), "--yes", "--json")[0] == 0
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


def test_rm_dry_run(run, left):
    code, out, _ = run("rm", "a.md", "--dry-run")
    assert code == 0 and out.splitlines()[-1].startswith("would remove 3 entries, ")
    code, out, _ = run("rm", "a.md", "--dry-run", "--json")
    said = json.loads(out)
    assert said["dry_run"] and set(said["removed"]) == {key_of(number).hex() for number in (0, 1, 3)}
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


def test_prune_to_a_size_passes_over_pinned(run, left, folder):
    with TieredStore(folder / "kv", cpu_bytes=0) as store:
        store.pin(key_of(0))
    code, _, err = run("prune", "--max-size", "0", "--dry-run")
    assert code == 0 and err == "1 pinned entry passed over\n"
    sizes = {entry["id"]: entry["bytes"] for entry in json.loads(run("ls", "--json")[1])["entries"]}
    room = sum(sizes.values()) - 1
    assert run("prune", "--max-size", room, "-y")[0] == 0
    assert len(left()) == 5
    assert run("prune", "--max-size", "0", "-y")[0] == 0
    assert left() == [0]


def test_prune_removes_what_is_idle_longest(run, left, folder):
    with TieredStore(folder / "kv", cpu_bytes=0) as store:
        for number in (1, 2, 3, 4, 9):
            store.get(key_of(number))
    sizes = [entry["bytes"] for entry in json.loads(run("ls", "--json")[1])["entries"]]
    assert run("prune", "--max-size", sum(sizes) - 1, "-y")[0] == 0
    assert left() == [1, 2, 3, 4, 9]


def test_verify_finds_and_repairs(run, left, folder):
    code, out, err = run("verify")
    assert (code, err) == (0, "") and re.fullmatch(r"6 records, [\d.]+ KiB read: nothing is damaged\n", out)
    spoil(folder, 2)
    code, out, err = run("verify")
    assert code == 1 and out.startswith(key_of(2).hex()[:12]) and "1 damaged\n" in out and "--repair" in err
    assert left() == [0, 1, 2, 3, 4, 9]
    code, out, _ = run("verify", "--repair", "--json")
    said = json.loads(out)
    assert (code, said["checked"], said["dropped"]) == (1, 6, 1)
    assert [item["id"] for item in said["damaged"]] == [key_of(2).hex()]
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


def test_stats_show_what_was_done(run, folder):
    code, out, _ = run("stats", "--json")
    done = json.loads(out)["history"]
    assert code == 0
    assert (done["hits"], done["misses"], done["puts"]) == ({"gpu": 0, "cpu": 0, "disk": 1}, 1, 6)
    assert done["evictions"] == {}
    for stage in ("encode", "write", "find", "load"):
        assert 0 < done["latency_ms"][stage]["median"] <= done["latency_ms"][stage]["p95"]
    with TieredStore(folder / "kv", cpu_bytes=0, disk_bytes=30_000) as store:
        store.put(key_of(20), kv_of(20))
        store.get(key_of(20))
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


def test_export_and_import(run, left, tmp_path):
    code, out, _ = run("export", "kv.tar")
    assert code == 0 and out.startswith("6 records written to kv.tar, ")
    code, _, err = run("export", "kv.tar")
    assert code == 1 and "--force" in err
    assert run("export", "kv.tar", "--force", "--filter", "document=a.md")[1].startswith("3 records written")
    assert run("rm", "a.md", "-y")[0] == 0 and left() == [2, 4, 9]
    code, out, _ = run("import", "kv.tar", "--json")
    assert code == 0 and json.loads(out)["records"] == 3
    assert left() == [0, 1, 2, 3, 4, 9]
    assert run("import", "kv.tar")[1].startswith("0 records taken in"), "what is there stays"
    assert run("import", "kv.tar", "--path", "elsewhere")[1].startswith("3 records taken in")
    with TieredStore(tmp_path / "elsewhere" / "kv", cpu_bytes=0) as store:
        assert store.get(key_of(0)) is not None and not store.contains(key_of(2))
    data = (tmp_path / "kv.tar").read_bytes()
    (tmp_path / "kv.tar").write_bytes(data[: len(data) // 2])
    code, out, err = run("import", "kv.tar", "--path", "third")
    assert (code, out, err.count("\n")) == (1, "", 1) and not (tmp_path / "third").exists()


def test_a_folder_of_kv_alone(run, tmp_path):
    with TieredStore(tmp_path / "alone", cpu_bytes=0) as store:
        store.put(key_of(1), kv_of(1))
    assert run("ls", "-q", "--path", "alone")[1].split() == [key_of(1).hex()]
    assert run("verify", "--path", "alone")[0] == run("compact", "--path", "alone")[0] == 0
    assert run("rm", key_of(1).hex(), "-y", "--path", "alone")[0] == 0
    assert run("ls", "-q", "--path", "alone")[1] == ""


@pytest.mark.parametrize(
    "argv", [["ls"], ["rm", "x"], ["prune", "--orphans"], ["verify"], ["compact"], ["export", "f"]]
)
def test_no_folder(argv, tmp_path, capsys):
    assert main([*argv, "--path", str(tmp_path / "nowhere")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ragkv: no stored KV in ") and err.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


def test_names_are_not_obeyed_by_the_terminal(run, folder, tmp_path):
    with Catalogue(folder / "documents") as catalogue:
        catalogue.put("\x1b[2Jevil.md", ["alpha one"], lambda many: torch.ones(len(many), 4).numpy())
    out = run("ls")[1]
    assert "\x1b" not in out and "?[2Jevil.md" in out


def test_a_real_folder_in_real_processes(tmp_path):
    """add with the bundled model, then what its folder shows, each in a process of its own."""

    def ragkv(*argv):
        done = subprocess.run([sys.executable, "-m", "ragkv.cli", *argv], capture_output=True, text=True, cwd=tmp_path)
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
