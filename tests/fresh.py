"""A fresh interpreter: what is imported, and what is missing, is the test's own."""

import os
import subprocess
import sys
from collections.abc import Sequence


def fresh(code: str, *args: object, python: Sequence[object] = (sys.executable,), **env: str) -> str:
    """What a program prints that sees the installed ragkv and nothing of this process."""
    run = subprocess.run(
        [*map(str, python), "-P", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        cwd="/",
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()
