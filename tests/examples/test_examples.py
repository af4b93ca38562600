"""Every example runs as a program; the web service is asked in ``tests/rag/test_async.py``.

One process runs them one after the other: loading the libraries is what takes time.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ragkv import bundled

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "On which river does Clearport lie?"

# Each program gets its own arguments and its own stdout.
RUN_ALL = """
import contextlib, io, json, runpy, sys
printed = {}
for path, *arguments in json.loads(sys.argv[1]):
    sys.argv = [path, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(path, run_name="__main__")
    printed[path] = out.getvalue()
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each example prints."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "clearport.md").write_text(bundled.documents()["clearport.md"])
    (folder / "broken.pdf").write_bytes(b"\0")
    arguments = {
        "qa.py": [str(folder), "--question", QUESTION, "--path", str(folder / "kv")],
        "your_own_retriever.py": [QUESTION],
    }
    programs = [
        [str(path), *arguments.get(path.name, [])] for path in sorted(EXAMPLES.glob("*.py")) if path.name != "web.py"
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(programs)], capture_output=True, text=True, timeout=300, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return {Path(path).name: out for path, out in json.loads(done.stdout).items()}


def test_qa(printed):
    out = printed["qa.py"]
    assert out.startswith("1 document(s), ")
    assert "skipped" in out and "broken.pdf: " in out
    assert f"{QUESTION}\n  " in out and "clearport.md (passage " in out


def test_your_own_retriever(printed):
    out = printed["your_own_retriever.py"]
    assert out.startswith(f"{QUESTION}\n")
    assert out.count("- KV from cpu: ") == 3 and "Clearport lies on the river Exe." in out


def test_plain_generate(printed):
    plain, own = re.search(r"model.generate:  (.*)\nengine.generate: (.*)\n", printed["plain_generate.py"]).groups()
    assert plain == own


def test_your_own_method(printed):
    rows = dict(re.findall(r"^(\w+)\(.*?\) +(\d+) of \d+ ", printed["your_own_method.py"], re.MULTILINE))
    fresh = [int(rows[name]) for name in ("Reuse", "Seams", "LegoLink", "FullPrefill")]
    assert fresh == sorted(fresh) and fresh[0] == 0 and len(set(fresh)) == 4


@pytest.mark.parametrize(("program", "found"), [("llamaindex_qa.py", "nodes"), ("haystack_qa.py", "documents")])
def test_other_frameworks(printed, program, found):
    """Their retrievers' passages are read once; those of the folder never again."""
    out = printed[program]
    assert out.startswith(f"{QUESTION}\n  ") and "Exe" in out.splitlines()[1] and "- clearport.md: " in out
    hits = re.findall(rf"{found} by where their KV came from: (.*)", out)
    assert hits[0] in ("{'cpu': 4}", "{'disk': 4}") and hits[1:] == ["{'computed': 1}", "{'cpu': 1}"]
