import json
import subprocess
import sys
from pathlib import Path

import pytest

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
