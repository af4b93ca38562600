"""How the bundled model was made: data, tokenizer, training, export, evaluation. Not installed with ragkv."""

import sys
from pathlib import Path

# `python -m` puts the repository's root on the path, where transformers' probe for a package named "kernels" would find
# ours. This package's modules are found without it, and ragkv is installed.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
