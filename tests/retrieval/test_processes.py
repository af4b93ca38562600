import json
import subprocess
import sys
from pathlib import Path

import pytest

from ragkv.errors import RetrievalError
from ragkv.retrieval import Catalogue

PROGRAM = Path(__file__).with_name("processes.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    done = subprocess.run([sys.executable, PROGRAM, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def outcome(report, name):
    assert "failed" not in report[name], report[name]["failed"]
    return report[name]


def test_kill_9_at_any_moment(report):
    crash = outcome(report, "crash")
    # The kills have to have fallen where they hurt.
    assert crash["written"] > 20 and crash["cut off"] > 5


def test_processes_write_and_read_at_the_same_time(report):
    together = outcome(report, "together")
    assert together["searches"] > 0 and together["passages"] > 30


def test_a_full_disk(report):
    full = outcome(report, "full")
    assert "full" in full["message"] and full["documents"] > 0


def test_a_folder_is_opened_once_a_process(tmp_path):
    with Catalogue(tmp_path), pytest.raises(RetrievalError, match="open already: share that object, or close it first"):
        Catalogue(tmp_path)
    Catalogue(tmp_path).close()


def test_a_forked_child_is_told(tmp_path, monkeypatch):
    catalogue = Catalogue(tmp_path)
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(RetrievalError, match="before this process was forked"):
        len(catalogue)
    catalogue.close()  # the parent's, so nothing happens
    monkeypatch.undo()
    assert len(catalogue) == 0
    catalogue.close()
