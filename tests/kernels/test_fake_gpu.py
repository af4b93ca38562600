"""What the host does on a GPU, by PyTorch and Triton themselves, over CUDA libraries that compute nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FAKE = Path(__file__).parents[2] / "benchmarks" / "gpu" / "fake"


@pytest.mark.long
@pytest.mark.skipif(
    not (torch.version.cuda or "").startswith("13") or shutil.which("g++") is None,
    reason="needs g++ and a PyTorch made for CUDA 13, as PyPI's is on Linux",
)
def test_warm_prompts_are_graphs_and_wait_for_nothing():
    options = ["--tokens", "1024", "--shape", "qwen-0.5b"]
    ran = subprocess.run(
        [sys.executable, FAKE / "fake.py", FAKE / "waits.py", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in ran.stdout.splitlines() if " of the host, " in line]
    assert ran.returncode == 0 and len(lines) == 18, ran.stdout + ran.stderr[-4000:]
    assert all(": graph, " in line and " 0 waits; " in line for line in lines), ran.stdout
