"""The Triton kernels, compiled where there is a GPU, else by Triton's interpreter in a process of their own.

See test_interpreter.py. The interpreter is chosen when triton is loaded and would stay for all other tests of a process, so
without it nothing is collected here.
"""

import os
from threading import RLock

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAKE = "FAKE_CUDA" in os.environ  # benchmarks/gpu/fake: the interpreter, on what torch takes for a GPU
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]
collect_ignore = [] if torch.cuda.is_available() else ["test_graphs.py"]  # no interpreter stands for CUDA's graphs


@pytest.fixture(autouse=INTERPRETED)
def one_by_one(monkeypatch):
    """The interpreter runs one kernel at a time: it changes triton's language while it does. Compiled kernels have no such need."""
    from triton.runtime.interpreter import GridExecutor

    lock, run = RLock(), GridExecutor.__call__

    def alone(*args, **kwargs):
        with lock:
            return run(*args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", alone)


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED and not FAKE else "cuda")


@pytest.fixture
def random(device):
    """Normal numbers of a shape and dtype, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape, dtype=torch.float32, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    return make


@pytest.fixture
def poisoned(device):
    """Memory full of NaN: what a kernel forgets to write shows."""
    return lambda *shape, dtype=torch.float32: torch.full(shape, torch.nan, dtype=dtype, device=device)


@pytest.fixture
def rounding():
    """The largest relative error of one rounding to a dtype: half a unit in the last place. Triton's interpreter cuts bf16 off."""
    return lambda dtype: torch.finfo(dtype).eps / (1 if INTERPRETED and dtype == torch.bfloat16 else 2)
