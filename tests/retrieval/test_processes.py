import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return ran("processes.py", folder)


@pytest.fixture(scope="module")
def hardships(tmp_path_factory):
    return ran("hardships.py", tmp_path_factory.mktemp("hardships"), "12", "3")


def ran(program, *args):
    # Two threads: what a parent's OpenMP leaves behind is what a forked child would wait for.
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    line = [sys.executable, HERE / program, *args]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
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


def test_kill_9_at_any_line(hardships):
    """Vectors in files, words, namespaces and conditions find what the catalogue has, and nothing else."""
    crash = outcome(hardships, "crash")
    assert crash["cut off"] > 4 and crash["segments"] > 4


def test_three_processes_change_ask_and_verify(hardships):
    three = outcome(hardships, "three")
    assert three["removed"] > 3
