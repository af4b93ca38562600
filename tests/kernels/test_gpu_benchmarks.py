"""The GPU benchmarks run: on a CPU, with sizes at which the figures mean nothing."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
PARTS = ("memory", "attention", "ttft", "graphs", "tiles")  # tiles only on a GPU
# As where neither of them is installed.
WITHOUT = """
import runpy, sys
sys.modules["lmdb"] = sys.modules["faiss"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], {}, "__main__")
"""


def test_tiny(warm, tmp_path):
    out = tmp_path / "rows.jsonl"
    run = subprocess.run(
        [*warm, "-P", "-c", WITHOUT, str(FOLDER / "run.py"), *PARTS, "--tiny", "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER), "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = {"copy", "bus", "memory", "attention", "scored_attention", "ttft", "decode", "graphs", "decode graphs"}
    assert {row["benchmark"] for row in rows} == kinds
    assert all(row["tiny"] and row["date"] and row["torch"] and "device" in row for row in rows)
    methods = {row["method"]: row for row in rows if row["benchmark"] == "ttft"}
    repairs = {"LegoLink(16)", "SensitiveTokens(0.1)", "RelevantTokens(0.1)", "CacheBlend(0.15)"}
    assert set(methods) == {"full prefill", "Reuse", *repairs}
    assert {row.get("tier") for row in rows if row["benchmark"] == "ttft"} == {None, "cpu", "cpu int8"}
    stages = {"place", "select", "recompute and first token", "total"}
    for name, row in methods.items():
        assert name == "full prefill" or (row["limit_seconds"] > 0 and row["hits"] == {"cpu": 4})
        assert name == "full prefill" or set(row["stages_ms"]) == stages
    graphs = [row for row in rows if row["benchmark"] == "graphs"]
    assert [row["ran"] for row in graphs] == ["eager"] * 5 + ["fixed"] * 5
    assert all(row["logits_apart"] < 1e-4 and len(row["first_seconds"]) == 3 for row in graphs[5:])
    said = [row for row in rows if row["benchmark"] == "decode graphs"]
    assert [(row["ran"], row["same_tokens"]) for row in said] == [("eager", 1.0), ("fixed", 1.0)]
    memory = [row for row in rows if row["benchmark"] == "memory"]
    places = {row["operation"] for row in memory if row["operation"].startswith("place")}
    assert places == {f"place {kind}" for kind in ("bf16", "pool", "int8", "fp8", "int4", "layers at once")}
    assert all(row["bytes"] > 0 and row["of_copy"] > 0 and min(row["seconds"]) > 0 for row in memory)
    attention = {row["what"]: row for row in rows if row["benchmark"] == "attention"}
    assert set(attention) == {"selective", "selective, few", "sdpa with a mask", "FlexAttention", "dense causal"}
    assert all(row["flops_per_s"] > 0 for row in attention.values())


def test_each_row_has_its_own_peak(monkeypatch):
    """Not that of whatever ran before it in the process."""
    bench = runpy.run_path(str(FOLDER / "measure.py"))["Bench"](torch.device("cuda", 0), True, 1, None)
    peaks = {0: 700}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device.index])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update({device.index: 20}))
    assert (bench.peak(), bench.peak()) == (700, 20)


def test_without_a_gpu_it_says_so():
    run = subprocess.run(
        [sys.executable, "-P", str(FOLDER / "run.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(FOLDER), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 2 and "no GPU that torch can use" in run.stderr


STUB = """#!/bin/sh
ls "${PYTHONPATH%%:*}"/ragkv/engine.py "${PYTHONPATH%%:*}"/ragkv/kernels/api.py > /dev/null || exit 3
echo "$@"
case "$*" in *memory*) exit 1;; esac
"""


def test_the_script_runs_its_parts_in_their_order(tmp_path):
    """Whatever is asked for runs, over this checkout's package; a part that fails is named and the others run all the same."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def script(*arguments):
        env = {**os.environ, "PYTHON": str(stub), "TRITON_INTERPRET": "1"}
        return subprocess.run(["bash", str(FOLDER / "run.sh"), *arguments], capture_output=True, text=True, env=env)

    some = script("attention", "ttft", "--tokens", "64")
    assert some.returncode == 0, some.stderr
    runs = ["== attention", "-P benchmarks/gpu/run.py attention --tokens 64", "== ttft"]
    assert some.stdout.splitlines()[:3] == runs
    everything = script()
    assert everything.returncode == 1 and everything.stderr.strip() == "failed: memory"
    graphs = script("graphs", "--rounds", "5").stdout.splitlines()
    assert graphs[0] == "== graphs" and graphs[1].endswith("tests/kernels/fused/test_graphs.py")
    assert graphs[2] == "-P benchmarks/gpu/run.py graphs --rounds 5"
    parts = [line for line in everything.stdout.splitlines() if line.startswith("==")]
    assert parts == ["== tests", "== inspect", "== memory", "== attention", "== ttft"]
