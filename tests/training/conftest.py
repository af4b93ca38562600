"""Makes ``training`` importable, which is not installed, without leaving the repository's root on the path."""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, _ROOT)
import training  # noqa: E402, F401 - takes the root off the path again
