"""ragkv advise, and what ragkv add would do: figures, and nothing written."""

import json

import pytest

from ragkv import RAG, bundled
from ragkv.errors import StoreError

from .commands import run
from .test_pages import page_of


@pytest.fixture(autouse=True)
def files(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = tmp_path / "files"
    files.mkdir()
    for name in ("clearport.md", "isgan-quinski.md", "fedor-ostker.md"):
        (files / name).write_text(bundled.documents()[name])
    (files / "noise.bin").write_bytes(bytes(range(256)) * 4)
    (files / ".hidden.md").write_text("Nothing.")


def content(folder):
    """What stands in every file; LMDB's list of readers is no content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock.mdb"}


def test_advice_as_table_and_as_json(capsys, monkeypatch):
    code, out, _ = run(capsys, "advise", "--limit", "1s", "--tokens", "2000000")
    assert code == 0
    lines = out.splitlines()
    assert "tokens/s of 16" in lines[0] and lines[2].split() == ["full", "prefill", "cpu", "disk", "page", "cache"]
    assert lines[3].startswith("reads") and lines[4].startswith("pays from")
    assert any(line.startswith("256 tokens") and line.count("x)") == 3 for line in lines)
    assert any(line.startswith("reading 2,000,000 tokens of documents, each twice: about") for line in lines)
    assert any(line.startswith("raw (in use)") for line in lines) and any(line.startswith("int8") for line in lines)
    monkeypatch.setattr("ragkv.library.costs.measure", None)  # it is kept
    monkeypatch.setattr("ragkv.library.costs._measured", {})
    code, out, _ = run(capsys, "advise", "--json")
    said = json.loads(out)
    assert code == 0 and list(said["tiers"]) == ["cpu", "disk", "page cache"] and said["corpus"]["tokens"] == 1_000_000


def test_advice_as_a_page(capsys, tmp_path):
    code, _, err = run(capsys, "advise", "--limit", "1s", "--html", "out.html")
    assert code == 0 and err.endswith("written to out.html\n")
    page = page_of(tmp_path / "out.html")
    assert page.tags.count("svg") == 1 and page.tags.count("table") == 2
    for words in ("full prefill", "memory", "disk", "page cache", "raw (in use)", "tokens/s of 16"):
        assert words in page.text
    code, _, err = run(capsys, "advise", "--html", "out.html")
    assert code == 1 and "--force replaces it" in err


def test_a_dry_run_makes_no_folder(capsys, home):
    code, out, err = run(capsys, "add", "--dry-run", "files", "--json")
    said = json.loads(out)
    assert code == 0 and not home.exists() and "skipped files/noise.bin: binary" in err
    assert len(said["added"]) == 3 and (said["changed"], said["unchanged"], said["moved"]) == ([], [], {})
    assert said["skipped"][0]["reason"] == "binary" and said["hidden"] == 1
    assert said["stored_tokens"] == 0 < said["tokens_to_read"] == said["tokens"] and said["seconds"] > 0
    code, _, _ = run(capsys, "add", "files")
    capsys.readouterr()
    code, out, _ = run(capsys, "docs", "--json")
    done = json.loads(out)
    assert sum(len(document["source"]) > 0 for document in done["documents"]) == 3
    assert sum(document["tokens"] for document in done["documents"]) == said["tokens"]
    assert said["kv_bytes"]["raw"] == pytest.approx(done["kv_bytes"]["disk"], rel=0.1), "what it then took"


def test_a_dry_run_changes_no_byte(capsys, home, tmp_path):
    """What is there is known; in another namespace nothing is."""
    assert run(capsys, "add", "files/clearport.md", "files/fedor-ostker.md")[0] == 0
    (tmp_path / "files" / "fedor-ostker.md").write_text(bundled.documents()["fedor-ostker.md"] + "\nAnd a line more.\n")
    (tmp_path / "files" / "clearport.md").rename(tmp_path / "files" / "moved.md")
    before = content(home)
    code, out, _ = run(capsys, "add", "--dry-run", "files")
    assert code == 0 and content(home) == before
    lines = out.splitlines()
    assert lines[0].startswith("documents: 1 added, 1 changed, 1 moved, 1 skipped (1 hidden one left out); ")
    assert not lines[1].startswith("KV of 0 tokens are there; to read: ") and lines[-1] == "nothing was done"
    said = json.loads(run(capsys, "add", "--dry-run", "files", "--json")[1])
    assert 0 < said["stored_tokens"] < said["tokens"] and 0 < said["tokens_to_read"] < said["tokens"]
    other = json.loads(run(capsys, "add", "--dry-run", "files", "--json", "--namespace", "another")[1])
    assert other["stored_tokens"] == 0 and content(home) == before
    assert run(capsys, "add", "files")[0] == 0
    said = json.loads(run(capsys, "add", "--dry-run", "files", "--json")[1])
    assert said["stored_tokens"] == said["tokens"] and said["tokens_to_read"] == said["seconds"] == 0
    assert len(said["unchanged"]) == 3 and said["kv_bytes"] == {}


def test_a_dry_run_without_the_kv_and_of_nothing(capsys, home, tmp_path):
    assert run(capsys, "add", "files/clearport.md")[0] == 0
    kv = home / "default" / "kv"
    for file in kv.iterdir():
        file.unlink()
    kv.rmdir()
    said = json.loads(run(capsys, "add", "--dry-run", "files/clearport.md", "--json")[1])
    assert said["stored_tokens"] == 0 < said["tokens_to_read"] and not kv.exists()
    assert run(capsys, "add", "--dry-run", "files/noise.bin")[0] == 1
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "add", "--dry-run", "--pin", "files")


def test_a_folder_for_reading_answers_and_takes_nothing(capsys, home):
    assert run(capsys, "add", "files/clearport.md")[0] == 0
    before = content(home)
    with RAG.open(home / "default", readonly=True) as rag:
        assert rag.ask("On which river does Clearport lie?", max_new_tokens=2).sources
        with pytest.raises(StoreError, match="reading only"):
            rag.add_texts(["Something else."])
    assert content(home) == before
