"""docs/tutorial.md runs: its blocks one after the other, in one program, each printing what stands behind it."""

import contextlib
import io
import re
from pathlib import Path

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def test_the_tutorial_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = TUTORIAL.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") > 10
    names: dict[str, object] = {"__name__": "tutorial"}
    for block in blocks:
        line = text[: block.start()].count("\n") + 2  # a failure names the line in the tutorial
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * (line - 1) + block[1], str(TUTORIAL), "exec"), names)
        out, shown = printed.getvalue(), block[2] or ""
        assert out == shown, f"{TUTORIAL.name}, line {line}"
