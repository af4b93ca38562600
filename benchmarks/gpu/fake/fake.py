"""Runs a program on a GPU that is not there: libraries that compute nothing answer what torch and Triton ask of CUDA.

    python benchmarks/gpu/fake/fake.py benchmarks/gpu/run.py ttft graphs --tokens 4096 16384 --out /tmp/rows.jsonl
    python benchmarks/gpu/fake/fake.py benchmarks/gpu/fake/waits.py
    python benchmarks/gpu/fake/fake.py --numbers -m pytest tests/kernels/fused/test_graphs.py -k llama
    python benchmarks/gpu/fake/fake.py --late 1 benchmarks/gpu/fake/races.py

So PyTorch itself runs all that the host does on a GPU: launches, copies, streams, events, graphs. CUDA's rules hold (runtime.cpp),
sizes are those of an H200, memory that nobody writes to is not taken, and times are the host's alone. Numbers mean nothing; what an
engine finds out of its model is computed on the CPU (no_numbers.py). With ``--numbers`` everything is, and what comes out is right,
and slow (numbers_on_host.py). With ``--late SEED`` work is done when it is waited for, or before by chance, in an order that
streams and events allow, so that whoever forgot to wait finds wrong numbers (late.cpp). Wants g++ and a PyTorch made for CUDA 13,
which PyPI's is on Linux. ``FAKE_CUDA_ERRORS=1`` tells of every error.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def main(arguments: list[str]) -> int:
    from libraries import build

    libraries = build()
    if arguments[:1] == ["--late"]:
        os.environ["FAKE_CUDA_LATE"] = str(int(arguments[1]))
        arguments = ["--numbers", *arguments[2:]]
    numbers = arguments[:1] == ["--numbers"]
    with tempfile.TemporaryDirectory() as tree:  # the folders as one package, as an installation would lay them out
        package = Path(tree) / "ragkv"
        package.mkdir()
        rooms = [ROOT / name for name in ("kernels", "store", "retrieval")]
        for path in [*(each for each in (ROOT / "ragkv").iterdir() if not each.is_symlink()), *rooms]:
            (package / path.name).symlink_to(path)
        env = os.environ | {
            "LD_PRELOAD": ":".join(
                str(libraries / name) for name in ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13")
            ),
            "LD_LIBRARY_PATH": str(libraries),
            "TRITON_LIBCUDA_PATH": str(libraries),
            "TRITON_INTERPRET": "1" if numbers else "0",
            "FAKE_CUDA": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (tree, HERE, HERE.parent))),
            "HF_HUB_OFFLINE": "1",
        }
        if not numbers:
            env["FAKE_CUDA_COPIES"] = str(1 << 16)
        return subprocess.run([sys.executable, "-P", __file__, "inside", *arguments], env=env).returncode


def inside(arguments: list[str]) -> int:
    """In the process that has the libraries."""
    numbers = arguments[0] == "--numbers"
    if numbers:
        import numbers_on_host

        numbers_on_host.install()
    else:
        import no_numbers

        no_numbers.install()
    sys.argv = arguments[numbers:]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(inside(sys.argv[2:]) if sys.argv[1:2] == ["inside"] else main(sys.argv[1:]))
