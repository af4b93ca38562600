"""Every example runs as a program; the web service is asked in ``tests/rag/test_async.py``.

One process runs them one after the other: loading the libraries is what takes time.
"""

import difflib
import json
import re
import subprocess
from pathlib import Path

import pytest

from ragkv import bundled

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "On which river does Clearport lie?"
TALK = f"{QUESTION}\nWho governs it?\n{QUESTION}\n\nwhat comes behind an empty line\n"

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
def printed(warm, tmp_path_factory):
    """What each example prints."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "clearport.md").write_text(bundled.documents()["clearport.md"])
    (folder / "broken.pdf").write_bytes(b"\0")
    arguments = {
        "qa.py": [str(folder), "--question", QUESTION, "--path", str(folder / "qa")],
        "chat.py": [str(folder), "--path", str(folder / "talked")],
        "langchain_qa.py": [QUESTION, "--path", str(folder / "talked")],  # which has documents
        "your_own_retriever.py": [QUESTION],
    }
    programs = [
        [str(path), *arguments.get(path.name, [])] for path in sorted(EXAMPLES.glob("*.py")) if path.name != "web.py"
    ]
    done = subprocess.run(
        [*warm, "-c", RUN_ALL, json.dumps(programs)],
        input=TALK,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return {Path(path).name: out for path, out in json.loads(done.stdout).items()}


def test_qa(printed):
    out = printed["qa.py"]
    assert out.startswith("1 document(s), ")
    assert "skipped" in out and "broken.pdf: " in out
    assert f"{QUESTION}\n  " in out and "clearport.md (passage " in out


def test_chat(printed):
    out = printed["chat.py"]
    assert out.count("from ") == out.count("tokens: ") == 3 and "clearport.md" in out
    counts = re.findall(r"tokens: (\d+) reused, (\d+) placed, (\d+) recomputed, (\d+) fresh", out)
    reused, placed, _, fresh = zip(*[map(int, row) for row in counts], strict=True)
    assert reused[0] < reused[1] < reused[2] and placed[0] > 0 == placed[2] and max(fresh[1:]) < reused[1]


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


def test_langchain_qa(printed):
    out = printed["langchain_qa.py"]
    sources = re.findall("^  - (.*?), ", out, re.MULTILINE)
    assert out.startswith(f"{QUESTION}\n  Exe\n")
    assert [Path(source).name for source in sources] == ["clearport.md"] * 2, "the folder's own, and no others"
    assert "chunks by where their KV came from: {'disk': 2}" in out and out.endswith("\nExe|\n")


def test_a_program_of_langchain_changes_in_few_lines(printed):
    """What docs/adapters.md shows is the whole difference, and the answer is the model's."""
    assert printed["langchain_before.py"] == "I was told to say this.\n" and printed["langchain_after.py"] == "Exe\n"
    before, after = (code(EXAMPLES / f"langchain_{name}.py") for name in ("before", "after"))
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert len([line for line in changed if line[0] == "+"]) <= 5
    shown = re.search(r"```diff\n(.*?)```", (EXAMPLES.parent / "docs" / "adapters.md").read_text(), re.DOTALL)
    assert sorted(shown[1].split("\n")[:-1]) == sorted(line[0] + line[2:].rstrip() for line in changed)


def code(path):
    """The lines of a program, behind its docstring."""
    return path.read_text().split('"""', 2)[2].splitlines(keepends=True)
