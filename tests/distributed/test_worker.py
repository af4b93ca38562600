"""What one worker does, without a cluster: into a pool that is a folder."""

import math
import time
from pathlib import Path

import pytest

from ragkv import RAG, ArgumentError, UploadError, bundled
from ragkv.distributed import precompute
from ragkv.distributed.batches import batches
from ragkv.distributed.desk import DEATHS, Desk
from ragkv.distributed.precomputing import _files
from ragkv.distributed.results import Result, gathered
from ragkv.distributed.worker import Worker
from ragkv.errors import RagKVError
from ragkv.opening import settled
from ragkv.retrieval import Catalogue, SkippedFile
from ragkv.store.remote import RemoteTier
from ragkv.store.remote.pool import PoolError
from tests.rag.rags import WordEmbedder

OWN = {"codec", "model", "method", "namespace", "context", "document_tokens", "chunk_tokens", "system", "device"}
TEXTS = {name: text[:900] for name, text in bundled.documents().items()}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """One model for all workers."""
    model = bundled.load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragkv.bundled.load", lambda: model)
        yield


@pytest.fixture
def worker(tmp_path):
    """Makes workers on one pool; all are closed."""
    made = []

    def make(options=None, remote=f"file://{tmp_path}/pool", **how) -> Worker:
        said = {
            "cpu_bytes": 1 << 30,
            "batch_bytes": 128 << 10,
            "upload_s": 60.0,
            "encoding": None,
            "desk": Desk(),
        } | how
        made.append(Worker(settled({"model": None, **(options or {})}, OWN, {}), remote, **said))
        return made[-1]

    yield make
    for each in made:
        each.close()


def rows(count: int = 3):
    return [{"source": name, "text": text} for name, text in list(TEXTS.items())[:count]]


def read(worker, documents):
    return [result for batch in worker.read(documents) for result in batch]


def objects(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "pool").glob("*/*")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "reuse", "context": "chunk", "namespace": "theirs"},
        {"document_tokens": 150, "chunk_tokens": 40},
    ],
    ids=["default", "chunks", "windows"],
)
def test_whoever_adds_the_documents_computes_nothing(options, worker, tmp_path):
    done = read(worker(options, batch_bytes=1), rows())
    assert all(result.tokens_read == result.tokens > 0 and not result.reason for result in done)
    with RAG.from_pretrained("bundled", embedder=WordEmbedder(), remote=f"file://{tmp_path}/pool", **options) as rag:
        added = rag.add_texts([row["text"] for row in rows()], [row["source"] for row in rows()])
        assert added.tokens_read == 0, "what the worker computed is not what adding looks for"
        keys = {key.hex() for row in rows() for key in rag._keys(row["source"])}
        assert {result.setting for result in done} == {rag.engine.documents.setting}
    assert objects(tmp_path) == keys, "the pool has more, or less, than the documents need"


def test_what_is_in_the_pool_is_not_computed(worker, tmp_path):
    read(worker(), rows(2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").glob("*/*")}
    done = {result.source: result for result in read(worker(), rows(3))}
    assert [done[row["source"]].tokens_read > 0 for row in rows(3)] == [False, False, True]
    assert all(path.stat().st_mtime_ns == written for path, written in before.items()), "it was sent again"
    report = gathered(done.values(), {})
    assert (report.documents, report.skipped) == (3, 2)


def test_kv_are_those_of_adding(worker, tmp_path):
    """Answers from the pool are the answers of whoever read the documents himself."""
    read(worker(), rows(2))
    answers = []
    for remote in (None, f"file://{tmp_path}/pool"):
        with RAG.from_pretrained("bundled", embedder=WordEmbedder(), remote=remote) as rag:
            rag.add_texts([row["text"] for row in rows(2)], [row["source"] for row in rows(2)])
            answers.append(rag.ask("Which river runs through it?", top_k=3, max_new_tokens=6).token_ids)
    assert answers[0] == answers[1]


def test_a_bad_document_fails_alone_and_is_named(worker, tmp_path):
    (tmp_path / "good.md").write_text(TEXTS["clearport.md"])
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.7 no more than that")
    files = [str(tmp_path / name) for name in ("good.md", "bad.pdf", "gone.md")]
    given = [
        *({"source": file} for file in files),
        {"source": "blank", "text": "  \n"},
        {"source": "none", "text": None},
        {"path": "s3://bucket/empty.txt", "bytes": b""},
        {"path": "s3://bucket/fine.txt", "bytes": b"A harbour and a river."},
        {"text": "Half a pair: \ud800"},
        {"text": "A text without a name."},
    ]
    done = read(worker(), given)
    assert len(done) == len(given)
    failed = {result.source: result.reason for result in done if result.reason}
    assert {name for name in failed if not name.startswith("text:")} == {
        *files[1:], "blank", "none", "s3://bucket/empty.txt"
    }  # fmt: skip
    assert "No such file" in failed[files[2]] and "blank" in failed["blank"] and "no str" in failed["none"]
    assert sum(name.startswith("text:") for name in failed) == 1
    report = gathered(done, {"x": "why"})
    assert (report.documents, report.skipped, len(report.failed)) == (3, 0, 7) and report.tokens == report.tokens_read


def test_a_file_is_read_as_adding_reads_it(worker, tmp_path):
    file = tmp_path / "docs" / "page.html"
    file.parent.mkdir()
    file.write_bytes("<h1>Clearport</h1>\r\n<p>The Arle flows there, caf\xe9.</p>".encode("cp1252"))
    assert not read(worker(encoding="cp1252"), [{"source": str(file)}])[0].reason
    with RAG.from_pretrained("bundled", embedder=WordEmbedder(), remote=f"file://{tmp_path}/pool") as rag:
        assert rag.add_files([file.parent], encoding="cp1252").tokens_read == 0


def test_a_link_is_read_as_what_it_is_called(worker, tmp_path):
    blob = tmp_path / "blob"
    blob.write_text("<h1>Clearport</h1><p>The Arle flows there.</p>")
    (tmp_path / "docs").mkdir()
    link = tmp_path / "docs" / "page.html"
    link.symlink_to(blob)
    names, sizes, _ = _files([link.parent])
    assert (names, sizes) == ([str(link)], [blob.stat().st_size])
    assert not read(worker(), [{"source": names[0]}])[0].reason
    with RAG.from_pretrained("bundled", embedder=WordEmbedder(), remote=f"file://{tmp_path}/pool") as rag:
        assert rag.add_files([link.parent]).tokens_read == 0


def test_memory_is_bounded_and_nothing_is_lost(worker, tmp_path):
    """All documents in one batch, and memory for a part of their KV."""
    one = worker(cpu_bytes=1 << 20, batch_bytes=1 << 30)
    most, put = [], one._store.put_many
    work = one._store.remote._uploads._work

    def slowly(key, what):
        time.sleep(0.05)
        return work(key, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragkv.library.documents._WRITTEN_TOGETHER_BYTES", 100_000)
        patch.setattr(one._store.remote._uploads, "_work", slowly)
        patch.setattr(one._store, "put_many", lambda *a, **k: (put(*a, **k), most.append(one._store.stats()))[0])
        done = read(one, rows(8))
    assert not any(result.reason for result in done)
    stats = most[-1]
    assert max(each.bytes["cpu"] for each in most) <= 1 << 20 and stats.evictions["cpu"], "it did not have to make room"
    assert len(objects(tmp_path)) == sum(result.passages for result in done)
    assert not one._store._tiers.home.facts or all("document:" not in name for name in one._store._tiers.home.facts)


def test_what_does_not_stay_in_the_pool_is_not_said_to_be_there(worker, tmp_path, monkeypatch):
    """Neither memory, which has it, is believed, nor what is known of a pool that is asked seldom."""
    one, text = worker(), rows(1)[0]["text"]
    sent, listed = one._store.sent, one._store.remote
    monkeypatch.setattr(listed._pool, "quick", False)
    monkeypatch.setattr(listed._manifest, "_good_until_s", math.inf)

    def lossy():
        sent()
        for path in (tmp_path / "pool").glob("*/*"):
            path.unlink()

    monkeypatch.setattr(one._store, "sent", lossy)
    monkeypatch.setattr("ragkv.distributed.outbox._ASKED", 1)
    results = read(one, [{"source": "first", "text": text}, {"source": "same text", "text": text}])
    assert results[0].tokens_read and not results[1].tokens_read
    assert all("3 of its 3" in result.reason for result in results) and gathered(results, {}).documents == 0


def test_a_pool_that_does_not_say_what_it_has_is_not_believed(worker, monkeypatch):
    def away(keys):
        raise PoolError("it is away")

    one = worker()
    monkeypatch.setattr(one._store.remote, "lacking", away)
    results = read(one, [*rows(1), {"source": "blank", "text": " "}])
    assert "it is away" in results[0].reason and "blank" in results[1].reason


def test_without_its_pool_reading_ends(worker):
    one = worker(remote=lambda: RemoteTier("redis://127.0.0.1:1", limit_s=0.1), upload_s=0.2)
    begin = time.monotonic()
    with pytest.raises(UploadError, match=r"redis://127.0.0.1:1.* did not take \d+ chunks within 0.2 s.*again"):
        read(one, rows(1))
    assert time.monotonic() - begin < 30


def test_a_document_that_workers_die_of_is_given_up(worker):
    """A process that dies does not say that it has come to an end."""

    class Death(BaseException):
        pass

    desk, documents = Desk(), rows(3)
    poison = documents[1]["source"]

    def dying(self, source, text):
        if source == poison:
            raise Death
        return alive(self, source, text)

    alive = Worker._computed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_computed", dying)
        for _ in range(DEATHS):
            with pytest.raises(Death):
                read(worker(desk=desk, batch_bytes=1 << 30), documents)
        done = {result.source: result for result in read(worker(desk=desk, batch_bytes=1 << 30), documents)}
    assert f"{DEATHS} workers died" in done[poison].reason
    assert not any(done[row["source"]].reason for row in documents if row["source"] != poison)


def test_who_comes_to_an_end_has_not_died(worker, monkeypatch):
    one, given = worker({"codec": "int8"}), [*rows(1), {"source": "blank", "text": " "}]
    assert one._store.codecs[0].name == "int8"
    for _ in range(DEATHS + 1):
        assert ["given up" in result.reason for result in read(one, given)] == [False, False]

    def away(document):
        raise UploadError("the pool is away")

    with monkeypatch.context() as patch:
        patch.setattr(one._documents, "add_once", away)
        for _ in range(DEATHS):
            with pytest.raises(UploadError):
                read(one, rows(1))
    assert not read(one, rows(1))[0].reason


def test_batches_are_of_one_length_and_longest_first():
    lengths = [5, 900, 40, 4, 6, 300, 310, 41]
    found = batches(lengths, 620)
    assert found == [[1], [6, 5], [7, 2, 4, 0, 3]]
    assert [sorted(batch) for batch in batches([0, 0, 0], 1)] == [[0, 1, 2]] and batches([], 9) == []
    assert batches([700, 0], 620) == [[0], [1]]


def test_workers_that_do_not_read_alike_are_found_out():
    told = []
    with pytest.raises(RagKVError, match="do not read alike, as b shows"):
        gathered([Result("a", 1, 5, 5, setting="x"), Result("b", 1, 5, 5, setting="y")], {}, lambda *s: told.append(s))
    assert told == [("a", 1)]


def test_options_of_another_kind_are_refused():
    pytest.importorskip("ray")
    with pytest.raises(ArgumentError, match="neighbours"):
        precompute(["docs/"], remote="memory://x", behind=2)
    with pytest.raises(TypeError, match="no option gpu_bytes"):
        precompute(["docs/"], remote="memory://x", gpu_bytes=5)
    with pytest.raises(ArgumentError, match="gpus must be >= 0"):
        precompute(["docs/"], remote="memory://x", gpus=-1)
    with pytest.raises(TypeError, match="remote must be the URL"):
        precompute(["docs/"], remote=RemoteTier("memory://x"))


@pytest.fixture
def begun(monkeypatch):
    """What would be given to a cluster of four CPUs."""
    pytest.importorskip("ray")
    given = []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ragkv.distributed.cluster.nodes", lambda: [{"CPU": 4.0}])
    monkeypatch.setattr(
        "ragkv.distributed.cluster.read", lambda *all, **more: given.append(all) or [Result("a", 1, 5, 5)]
    )
    return given


def test_workers_are_told_what_holds_everywhere(begun, tmp_path, monkeypatch):
    """A model by its absolute path, a device; and there are no more workers than there is work."""
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text(name * 60)
    (tmp_path / "mine").mkdir()
    (tmp_path / "packed.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    given = {"remote": "memory://x", "cpus": 1}
    with Catalogue(tmp_path / "kv" / "documents") as catalogue:
        catalogue.keep_defaults({"model": "bundled", "chunk_tokens": 40})
    told = []
    assert precompute("a.md", "mine", tokenizer="mine", codec="int8", progress=told.append, **given).tokens_read == 5
    assert [(step.source, step.done_documents, step.documents) for step in told] == [("a", 1, 1)]
    precompute(["a.md", "b.md"], "packed.gguf", batch_bytes=200, **given)
    precompute("a.md", path="kv", **given)
    (files, make, share), (more, packed, two), (_, kept, _) = begun
    assert kept.args[0] == {"model": "bundled", "chunk_tokens": 40, "device": "cpu"}
    assert files == [[str(tmp_path / "a.md")]] and len(more) == two.workers == 2
    assert share == (1, 1, 0)
    assert make.args[0] == {
        **dict.fromkeys(("model", "tokenizer"), str(tmp_path / "mine")),
        "codec": "int8",
        "device": "cpu",
    }
    assert packed.args[0]["model"] == str(tmp_path) and packed.args[0]["gguf_file"] == "packed.gguf"


def test_files_that_cannot_even_be_handed_out_are_named(monkeypatch):
    found = [SkippedFile("/shut", "cannot be listed"), "/nowhere", "/half\udcff"]
    monkeypatch.setattr("ragkv.distributed.precomputing.found_files", lambda paths: found)
    names, sizes, unread = _files(["/"])
    assert (names, sizes) == (["/nowhere"], [0]), "whoever reads it says why it cannot be"
    assert list(unread) == ["/shut", "/half\udcff"] and "Unicode" in unread["/half\udcff"]


def test_where_there_is_nothing_to_read_no_cluster_is_asked(begun, tmp_path):
    report = precompute([tmp_path], remote="memory://x")
    assert not begun and (report.documents, report.failed) == (0, {})
