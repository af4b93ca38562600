"""Every kernel compiled for GPUs that need not be there: no tile spills, and the instructions that matter are used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "inspect_kernels.py"


def inspect(tmp_path, *arguments):
    pytest.importorskip("triton")
    out, home = tmp_path / "rows.json", tmp_path / "home"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(out), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_HOME": str(home), "TRITON_INTERPRET": "0"},
    )
    assert out.exists(), run.stderr[-4000:]
    rows = json.loads(out.read_text())
    assert rows and not [row for row in rows if row["fault"]], run.stderr
    assert run.returncode == 0
    assert not list(home.glob("**/*.cubin")), "the user's cache of compiled kernels must not be written to"
    return rows


def test_what_runs_most(tmp_path):
    """bf16, head_dim 128: in `make test`; the rest in `make test-long`."""
    rows = inspect(tmp_path, "--arch", "80", "90", "--label", "bf16 D=128", "--quick")
    operations = {"place", "selective_attention", "scatter", "deviation", "scores"}
    assert {row["kernel"] for row in rows} == operations | {"combine"}
    assert all(row["registers"] > 0 and row["instructions"] > 50 for row in rows)
    assert all(row["loads_16"] and not row["spilled_bytes"] for row in rows)
    assert all(row["matrix"] for row in rows if row["kernel"] in ("selective_attention", "scores"))


def test_what_is_decoded(tmp_path):
    """No number is read byte by byte, values stay with the threads that read them, and enough is under way for what memory gives.

    4.8 TB/s, of which int4 reads a fifth and int8 a third, are 7 and 12 KB in a microsecond for each of 132 processors.
    """
    rows = inspect(tmp_path, "--arch", "90", "--kernel", "place", "--label", "int")
    rows = {row["label"]: row for row in rows if row["label"].startswith(("int4", "int8"))}
    assert {label[:6] for label in rows} == {"int8 K", "int8 V", "int4 K", "int4 V"}
    assert all(row["loads_1"] == 0 for row in rows.values())
    assert rows["int8 V D=128"]["shared_bytes"] == 0
    least = {"int4": 20 << 10, "int8": 48 << 10}
    assert all(row["asked_bytes"] >= least[label[:4]] for label, row in rows.items())


@pytest.mark.long
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_everything(arch, tmp_path):
    assert len(inspect(tmp_path, "--arch", str(arch))) > 40


def test_faults_are_found(tmp_path, monkeypatch):
    """A kernel that spills, and one without wide loads or matrix instructions, do not pass."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from inspect_kernels import Resources

    row = Resources("k", "l", 90, 255, 0, 16, 100, 0, 1, 4, 0, 0, 2, 0, True, True)
    assert row.fault == "spills 16 bytes, no 16-byte loads, loads of single bytes, no matrix instructions"
    assert Resources("k", "l", 90, 255, 0, 0, 100, 4, 0, 4, 0, 8, 2, 0, True, True).fault == ""
