"""What the host does on a GPU, by PyTorch and Triton themselves, over CUDA libraries that compute nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FAKE = Path(__file__).parents[2] / "benchmarks" / "gpu" / "fake"


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (torch.version.cuda or "").startswith("13") or shutil.which("g++") is None,
        reason="needs g++ and a PyTorch made for CUDA 13, as PyPI's is on Linux",
    ),
]


def run(*arguments):
    return subprocess.run(
        [sys.executable, FAKE / "fake.py", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_warm_prompts_are_graphs_and_wait_for_nothing():
    ran = run(FAKE / "waits.py", "--tokens", "1024", "--shape", "qwen-0.5b")
    lines = [line for line in ran.stdout.splitlines() if " of the host, " in line]
    assert ran.returncode == 0 and len(lines) == 18, ran.stdout + ran.stderr[-4000:]
    assert all(": graph, " in line and " 0 waits; " in line for line in lines), ran.stdout


@pytest.mark.parametrize("late", ["0", "1"])
def test_work_that_is_done_late_changes_no_number(late):
    ran = run("--late", late, FAKE / "races.py", "--steps", "20", "--seed", late)
    assert ran.returncode == 0 and "0 of 20 wrong" in ran.stdout, ran.stdout + ran.stderr[-4000:]


COPY = """
import torch

side, pinned = torch.cuda.Stream(), torch.ones(100, pin_memory=True)
there = torch.zeros(100, device="cuda")
torch.cuda.synchronize()
there.copy_(pinned, non_blocking=True)
"""


@pytest.mark.parametrize(
    "forgotten, wrong",
    [
        ("pinned.fill_(2.0); print(there.sum().item())", "200.0"),
        ("with torch.cuda.stream(side): print(there.sum().item())", "0.0"),
    ],
    ids=["overwritten", "unordered"],
)
def test_who_forgets_to_wait_finds_wrong_numbers(forgotten, wrong, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(COPY + forgotten)
    assert run("--late", "0", program).stdout.split() == [wrong]
    assert run("--numbers", program).stdout.split() == ["100.0"]
    program.write_text(f"{COPY}torch.cuda.synchronize()\n{forgotten}")
    assert run("--late", "0", program).stdout.split() == ["100.0"]
