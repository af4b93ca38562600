"""The GPU benchmarks run: on a CPU, with sizes at which the figures mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


def test_tiny(tmp_path):
    out = tmp_path / "rows.jsonl"
    run = subprocess.run(
        [sys.executable, "-P", str(FOLDER / "run.py"), "--tiny", "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER), "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["benchmark"] for row in rows} == {"copy", "memory", "attention", "question_scores", "ttft", "decode"}
    assert all(row["tiny"] and row["date"] and row["torch"] and "device" in row for row in rows)
    methods = {row["method"]: row for row in rows if row["benchmark"] == "ttft"}
    assert set(methods) == {"full prefill", "Reuse", "LegoLink(16)", "CacheBlend(0.15)"}
    assert all(row["limit_seconds"] > 0 and row["hits"] for name, row in methods.items() if name != "full prefill")
    places = [row for row in rows if row.get("operation", "").startswith("place")]
    assert {row["operation"] for row in places} == {f"place {kind}" for kind in ("bf16", "pool", "int8", "fp8", "int4")}
    assert all(row["bytes"] > 0 and min(row["seconds"]) > 0 for row in places)


def test_without_a_gpu_it_says_so():
    run = subprocess.run(
        [sys.executable, "-P", str(FOLDER / "run.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(FOLDER), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 2 and "no GPU that torch can use" in run.stderr
