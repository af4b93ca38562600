"""One environment a folder and process: shared, reopened after a fork; folders that are full, replaced, damaged or elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time

import lmdb
import pytest

from ragkv.errors import RecordError, StoreError, StoreFullError
from ragkv.folder import Environment
from ragkv.folder.shared_lock import SharedLock

DATABASES = {b"plain": {}, b"several": {"dupsort": True}}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "folder"


@pytest.fixture
def environment(folder):
    environment = Environment.open(folder, DATABASES)
    yield environment
    if Environment.is_open(folder):
        environment.close()


def put(environment, *keys, value=b"x"):
    with environment.transaction(write=True) as txn:
        for key in keys:
            txn.put("plain", key, value)


def keys(environment):
    with environment.transaction() as txn:
        return list(txn.keys("plain"))


def test_import_loads_no_lmdb():
    code = "import sys, ragkv.folder, ragkv.store, ragkv.retrieval; assert 'lmdb' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


def test_it_is_shared_within_a_process(folder):
    one = Environment.open(folder, DATABASES)
    two = Environment.open(folder.parent / "." / "folder", DATABASES)
    assert one is two
    one.close()
    put(two, b"a")
    assert Environment.is_open(folder) and keys(two) == [b"a"]
    with pytest.raises(StoreError, match="another kind"):
        Environment.open(folder, {b"plain": {}})
    two.close()
    assert not Environment.is_open(folder)


def test_a_folder_whose_name_is_no_unicode(tmp_path):
    folder, copy = (tmp_path / os.fsdecode(name) for name in (b"k\xe9v", b"\xff"))
    try:
        copy.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    environment = Environment.open(folder, DATABASES)
    put(environment, b"a")
    assert environment.problems() == []
    environment.copy(copy)
    environment.close()
    for where in (folder, copy):
        opened = Environment.open(where, DATABASES, readonly=True)
        assert keys(opened) == [b"a"]
        opened.close()


def test_a_read_only_one(folder, environment):
    put(environment, b"a")
    environment.close()
    reading = Environment.open(folder, DATABASES, readonly=True)
    assert reading.readonly and keys(reading) == [b"a"] and reading.problems() == []
    with pytest.raises(StoreError, match="reading only"):
        put(reading, b"b")
    with pytest.raises(StoreError, match="reading only"):
        Environment.open(folder, DATABASES)
    reading.close()
    with pytest.raises(StoreError, match="not a folder"):
        Environment.open(folder.parent / "nothing", DATABASES, readonly=True)
    assert not (folder.parent / "nothing").exists()


READER = """
import sys
from pathlib import Path
from ragkv.folder import Environment

reading = Environment.open(Path(sys.argv[1]), {b"plain": {}, b"several": {"dupsort": True}}, readonly=True)
with reading.transaction() as txn:
    before = list(txn.items("plain"))
    print(len(before), flush=True)
    sys.stdin.readline()
    print(list(txn.items("plain")) == before)
"""


def test_what_a_read_only_one_looks_at_is_not_written_over(folder, environment):
    names = [b"%d" % number for number in range(50)]
    put(environment, *names, value=b"before" * 100)
    command, pipe = [sys.executable, "-P", "-c", READER, folder], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as reader:
        assert reader.stdout.readline() == "50\n"
        for number in range(20):
            put(environment, *names, value=b"%06d" % number * 100)
        assert reader.communicate("\n")[0] == "True\n"


def test_threads_and_forks(environment, forked):
    """Children write while the parent's threads do, and a transaction of the parent is over for them."""
    stop = threading.Event()

    def work(name):
        while not stop.is_set():
            put(environment, name)
            assert name in keys(environment)

    threads = [threading.Thread(target=work, args=(name,)) for name in (b"x", b"y")]
    for thread in threads:
        thread.start()
    try:
        with environment.transaction() as open_here:

            def child(name):
                with pytest.raises(StoreError, match="forked"):
                    open_here.count("plain")
                put(environment, name)
                return name in keys(environment)

            assert [forked(lambda name=name: child(name)) for name in (b"1", b"2", b"3")] == ["True"] * 3
            assert b"1" not in list(open_here.keys("plain"))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {b"1", b"2", b"3"} <= set(keys(environment)) and environment.problems() == []


def test_a_fork_waits_for_who_reads_in_a_folder_that_was_opened_meanwhile(tmp_path, environment, forked, monkeypatch):
    def work():
        inside, out, shut = threading.Event(), threading.Event(), SharedLock.shut

        def read():
            with other.transaction():
                inside.set()
                time.sleep(0.2)
                out.set()

        def opening(gate):
            nonlocal other
            shut(gate)
            if other is None:
                other = Environment.open(tmp_path / "other", DATABASES)
                threading.Thread(target=read).start()
                inside.wait()

        other = None
        monkeypatch.setattr(SharedLock, "shut", opening)
        child = os.fork()
        if not child:
            os._exit(0 if out.is_set() else 1)
        return os.waitpid(child, 0)[1]

    assert forked(work, timeout_s=20) == "0"


def test_a_full_map_changes_nothing(folder, monkeypatch):
    monkeypatch.setattr("ragkv.folder.environment.MIN_MAP_BYTES", 1 << 18)
    environment = Environment.open(folder, DATABASES)
    put(environment, b"a")
    with pytest.raises(StoreFullError, match="map is full"):
        put(environment, *(b"%d" % number for number in range(100)), value=bytes(5000))
    assert keys(environment) == [b"a"]
    put(environment, b"b")
    environment.close()


def test_reader_slots_run_out_and_those_of_killed_processes_are_freed(folder, forked, monkeypatch):
    monkeypatch.setattr("ragkv.folder.connection.MAX_READERS", 3)
    environment = Environment.open(folder, DATABASES)

    def hold():
        environment.begin()
        os.kill(os.getpid(), 9)

    for _ in range(5):
        assert forked(hold) == "signal 9"
    readings = [environment.begin() for _ in range(3)]
    with pytest.raises(StoreError, match="as many batches and snapshots"):
        environment.begin()
    for reading in readings:
        reading.close()
    assert keys(environment) == []
    environment.close()


@pytest.mark.parametrize("how", ["deleted", "replaced", "made anew"])
def test_a_folder_deleted_or_replaced_under_a_running_process(tmp_path, folder, environment, how):
    put(environment, *(b"%d" % number for number in range(500)), value=bytes(500))
    if how == "replaced":
        other = Environment.open(tmp_path / "other", DATABASES)
        put(other, b"b")
        other.close()
        os.replace(tmp_path / "other" / "data.mdb", folder / "data.mdb")
        length = (folder / "data.mdb").stat().st_size
    else:
        shutil.rmtree(folder)
    if how == "made anew":
        folder.mkdir()
    for _ in range(2):
        with pytest.raises(StoreError, match="deleted or replaced"):
            put(environment, b"c")
    if how != "replaced":
        with pytest.raises(StoreError, match="deleted or replaced"):
            environment.file_bytes()
    assert len(keys(environment)) == 500
    if how == "replaced":
        with pytest.raises(StoreError, match="deleted or replaced"):
            Environment.open(folder, DATABASES)
        assert (folder / "data.mdb").stat().st_size == length, "another's file was lengthened"
    environment.close()
    again = Environment.open(folder, DATABASES)
    assert keys(again) == ([b"b"] if how == "replaced" else [])
    put(again, b"c")


@pytest.fixture
def leaves(folder, environment):
    """A closed folder of many leaves; its roots lie before them."""
    put(environment, *(b"%05d" % number for number in range(3000)), value=bytes(300))
    for number in range(10):
        put(environment, b"%d" % number)
    environment.close()
    return folder / "data.mdb"


def test_no_write_once_reading_found_damage(folder, leaves):
    """LMDB trusts its pages: to change damaged ones can end the process or spoil others."""
    raw = leaves.read_bytes()
    page = raw.index(b"01500") // 4096 * 4096
    leaves.write_bytes(raw[:page] + bytes(4096) + raw[page + 4096 :])
    environment = Environment.open(folder, DATABASES)
    put(environment, b"00001")  # nobody knows yet
    with pytest.raises(RecordError, match="damaged"), environment.transaction() as txn:
        txn.get("plain", b"01500")
    with pytest.raises(RecordError, match=r"damaged.*verify --repair"):
        put(environment, b"00001")
    assert environment.problems()
    environment.close()


def test_what_is_not_what_was_sealed_does_not_stop_writing_where_all_pages_are_sound(environment):
    with pytest.raises(RecordError, match="a reader"), environment.transaction():
        raise RecordError("found by a reader")
    put(environment, b"a")
    assert keys(environment) == [b"a"]


@pytest.mark.parametrize("readonly", [False, True])
def test_a_file_that_was_cut_short_is_refused_and_left_as_it_is(folder, leaves, readonly):
    """To iterate into pages that read as zeros would end the process as surely as to touch what is missing."""
    length = leaves.stat().st_size // 4 * 3
    os.truncate(leaves, length)
    for _ in range(2):
        with pytest.raises(RecordError, match=r"cut short.*verify --repair"):
            Environment.open(folder, DATABASES, readonly=readonly)
    assert leaves.stat().st_size == length and not Environment.is_open(folder)


@pytest.mark.parametrize("length", [0, 4095, 4096, 8191, 8192, 8193, 100_000])
def test_a_file_that_is_cut_short_while_it_is_open(folder, leaves, length, forked):
    def use():
        environment = Environment.open(folder, DATABASES)
        reading = environment.begin()
        os.truncate(leaves, length)
        for work in (lambda: keys(environment), lambda: put(environment, b"a"), environment.begin):
            with pytest.raises(RecordError, match=r"cut short"):
                work()
        with pytest.raises(RecordError, match="cut short"), environment.inside():
            raise AssertionError
        reading.close()
        environment.close()
        return leaves.stat().st_size

    assert forked(use) == str(length)


def test_a_file_that_lacks_only_pages_without_use_is_lengthened(folder, leaves):
    environment = Environment.open(folder, DATABASES)
    with environment.transaction(write=True) as txn:
        txn.clear("plain")
    environment.close()
    length = leaves.stat().st_size
    os.truncate(leaves, length - 4096)
    environment = Environment.open(folder, DATABASES)
    assert keys(environment) == [] and leaves.stat().st_size == length and environment.problems() == []
    put(environment, b"a")
    environment.close()


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_network_file_systems_are_refused(tmp_path, monkeypatch, kind):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path / 'net work'} {kind} rw 0 0\n".replace("t w", "t\\040w")
    )
    monkeypatch.setattr("ragkv.folder.filesystem.MOUNTS", mounts)
    with pytest.raises(StoreError, match=kind):
        Environment.open(tmp_path / "net work" / "folder", DATABASES)
    assert not (tmp_path / "net work").exists()
    Environment.open(tmp_path / "local", DATABASES).close()


@pytest.mark.parametrize("name", ["Büro", os.fsdecode(b"\xff")], ids=["letters", "no Unicode"])
def test_network_file_systems_whose_names_are_not_ascii(tmp_path, monkeypatch, name):
    mounts = tmp_path / "mounts"
    mounts.write_bytes(os.fsencode(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path / name} nfs4 rw 0 0\n"))
    monkeypatch.setattr("ragkv.folder.filesystem.MOUNTS", mounts)
    with pytest.raises(StoreError, match="nfs4"):
        Environment.open(tmp_path / name / "folder", DATABASES)
    Environment.open(tmp_path / "local", DATABASES).close()


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "folder").write_text("x")
    with pytest.raises(StoreError, match="cannot be made"):
        Environment.open(tmp_path / "folder", DATABASES)


def test_another_kind_of_file(folder):
    folder.mkdir(parents=True)
    (folder / "data.mdb").write_bytes(b"something else " * 1000)
    with pytest.raises(RecordError, match="is damaged"):
        Environment.open(folder, DATABASES)
    assert not Environment.is_open(folder)


def test_commits_are_on_the_disk_with_their_meta_page(folder, monkeypatch):
    """Without that a power cut takes back the last change that was reported done."""
    seen, real = [], lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda *args, **flags: (seen.append(flags), real(*args, **flags))[1])
    Environment.open(folder, DATABASES).close()
    Environment.open(folder, DATABASES, durable=False).close()
    assert [(flags["sync"], flags["metasync"]) for flags in seen] == [(True, True), (False, False)]


@pytest.mark.parametrize("readonly", [False, True])
def test_a_file_that_grows_while_it_is_looked_at_is_not_short(folder, environment, monkeypatch, readonly):
    put(environment, b"a")
    environment.close()
    environment = Environment.open(folder, DATABASES, readonly=readonly)
    monkeypatch.setattr(environment._live, "_lengthen", lambda: pytest.fail("it waits for the lock of the writer"))

    def grown():
        length = (folder / "data.mdb").stat().st_size + 4096
        os.truncate(folder / "data.mdb", length)
        return length

    monkeypatch.setattr(environment._live, "_needed_bytes", grown)
    environment._live.ensure_length()
    environment.close()


def test_it_is_closed_when_no_other_thread_is_inside(environment):
    put(environment, b"a")
    closing = threading.Thread(target=environment.close)
    with environment.inside():
        closing.start()
        closing.join(0.3)
        assert closing.is_alive()
        assert environment._live.env.stat()["psize"]  # not closed yet
    closing.join(10)
    assert not closing.is_alive()
    with pytest.raises(StoreError):
        keys(environment)


def test_a_gate_that_is_shut_twice_is_opened_twice():
    gate, passed = SharedLock(), threading.Event()

    def enter():
        with gate:
            passed.set()

    gate.shut()
    gate.shut()
    threading.Thread(target=enter).start()
    gate.open()
    assert not passed.wait(0.2)
    gate.open()
    assert passed.wait(10)
