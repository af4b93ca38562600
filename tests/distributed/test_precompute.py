"""A real model on a local Ray of two workers, one of which is killed in the middle of its work."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from ragkv import RAG, DocumentError, ModelNotFoundError, bundled
from ragkv.distributed import precompute
from tests.rag.rags import WordEmbedder

pytestmark = pytest.mark.long


@pytest.fixture
def folder(tmp_path):
    """Documents, one of which is none."""
    path = tmp_path / "docs"
    path.mkdir()
    for name, text in bundled.documents().items():
        (path / name).write_text(text)
    (path / "bad.pdf").write_bytes(b"%PDF-1.7 no more than that")
    return path


class Killer(threading.Thread):
    """Kills one worker as soon as the pool has some of what it computes."""

    def __init__(self, pool: Path) -> None:
        super().__init__(daemon=True)
        self.pool, self.killed = pool, []

    def run(self):
        until = time.monotonic() + 120
        while time.monotonic() < until and not self.killed:
            if any(self.pool.glob("*/*")):
                children = psutil.Process().children(recursive=True)
                workers = [child for child in children if "MapWorker" in "".join(child.cmdline()[:1])]
                if len(workers) == 2:
                    os.kill(workers[0].pid, signal.SIGKILL)
                    self.killed.append(workers[0].pid)
            time.sleep(0.01)


def test_a_worker_is_killed_and_whoever_adds_computes_nothing(ray, folder, tmp_path):
    pool, given = tmp_path / "pool", {"workers": 2, "cpus": 1, "batch_bytes": 4 << 10}
    killer = Killer(pool)
    killer.start()
    told = []
    report = precompute([folder], remote=f"file://{pool}", progress=told.append, **given)
    assert killer.killed, "nobody was killed: the test shows nothing"
    count = len(bundled.documents())
    assert report.documents == count and list(report.failed) == [str(folder / "bad.pdf")]
    assert 0 < report.tokens_read <= report.tokens and report.seconds > 0
    assert [step.done_documents for step in told] == list(range(1, count + 2)) and told[-1].documents == count + 1

    again = precompute([folder], remote=f"file://{pool}", **given)
    assert (again.documents, again.skipped, again.tokens_read) == (count, count, 0)
    assert again.setting == report.setting and list(again.failed) == list(report.failed)

    with RAG.from_pretrained("bundled", embedder=WordEmbedder(), remote=f"file://{pool}") as rag:
        assert rag.engine.documents.setting == report.setting
        added = rag.add_files([folder])
        assert added.tokens_read == 0 and [skipped.source for skipped in added.skipped] == [str(folder / "bad.pdf")]
        got = rag.ask("Which river runs through Clearport?", top_k=3, max_new_tokens=8).token_ids
        keys = {key.hex() for document in rag.documents() for key in rag._keys(document.source)}
    assert {path.name for path in pool.glob("*/*")} == keys
    with RAG.from_pretrained("bundled", embedder=WordEmbedder()) as alone:
        alone.add_files([folder])
        assert alone.ask("Which river runs through Clearport?", top_k=3, max_new_tokens=8).token_ids == got


def test_a_dataset_of_binary_files(ray, folder, tmp_path):
    (folder / "bad.pdf").unlink()
    for path in list(folder.iterdir())[4:]:
        path.unlink()
    pool = f"file://{tmp_path}/pool"
    given = ray.data.read_binary_files(str(folder), include_paths=True)
    report = precompute(given, "bundled", remote=pool, cpus=1)
    assert report.documents == 4 and not report.failed
    with RAG.from_pretrained("bundled", embedder=WordEmbedder(), remote=pool) as rag:
        assert rag.add_files([folder]).tokens_read == 0
    with pytest.raises(DocumentError, match=r"has a column text.*got \['id'\]"):
        precompute(ray.data.range(3), "bundled", remote=pool)
    with pytest.raises(ModelNotFoundError, match=r"/no/such/model.*--model"):
        precompute([folder], "/no/such/model", remote=pool, cpus=1)


def test_the_command_reads_on_a_cluster_and_adds_here(folder, tmp_path):
    """In a process of its own, with a Ray of its own."""
    for path in sorted(folder.glob("*.md"))[3:]:
        path.unlink()
    environment = {**os.environ, "RAGKV_HOME": str(tmp_path / "home"), "RAY_AUTH_TOKEN": "0" * 64}
    command = [
        sys.executable,
        "-P",
        "-m",
        "ragkv.cli",
        "add",
        "--json",
        "--remote",
        f"file://{tmp_path}/pool",
        str(folder),
    ]
    run = subprocess.run([*command, "--ray", "local"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    done = json.loads(run.stdout)
    assert done["documents"]["added"] == 3 and done["tokens_read"] == 0
    before = done["precomputed"]
    assert before["documents"] == 3 and before["tokens_read"] > 0
    assert list(before["failed"]) == [str(folder / "bad.pdf")] == [skipped["source"] for skipped in done["skipped"]]
    said = [
        line for line in run.stderr.splitlines() if line and not line.startswith("[")
    ]  # Ray says that it says nothing
    assert len(said) == 1 and said[0].startswith("skipped") and "bad.pdf" in said[0]
