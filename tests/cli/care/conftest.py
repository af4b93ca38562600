"""A folder with documents and their KV, and the commands that care for it."""

import pytest
import torch

from ragkv.chunk import ChunkKV
from ragkv.cli import main
from ragkv.retrieval import Catalogue, Reading
from ragkv.store import TieredStore, chunk_key

TEXTS = {"a.md": ["alpha one", "alpha two", "shared"], "b.md": ["beta one", "shared"]}
NUMBERS = {"alpha one": 0, "alpha two": 1, "beta one": 2, "shared": 3}


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
            reading = Reading("ab" * 32, [key_of(NUMBERS[text]) for text in texts], b"")
            vectors = lambda many: torch.ones(len(many), 4).numpy()  # noqa: E731
            catalogue.put(str(tmp_path / source), texts, vectors, reading=reading)
    with TieredStore(path / "kv", cpu_bytes=0, codec="int8") as store:
        for number in range(5):
            store.put(key_of(number), kv_of(number, tokens=30 + number), space="model", cost_s=0.1, label="a document")
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


@pytest.fixture
def key():
    """The key of an entry, by number."""
    return key_of


@pytest.fixture
def kv():
    """Some KV."""
    return kv_of


@pytest.fixture
def spoil(folder, damage):
    """Changes a bit of an entry."""

    def spoil(number):
        with TieredStore(folder / "kv", cpu_bytes=0) as store:
            damage(store, key_of(number) + bytes(4), 17)

    return spoil
