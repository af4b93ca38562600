"""The programs in benchmarks/, which are not installed."""

import importlib.util
import sys
from pathlib import Path


def load(name):
    """One of them as a module. They import each other by these names: what one imports is loaded before it."""
    file = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
