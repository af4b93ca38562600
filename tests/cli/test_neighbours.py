"""Documents read behind their neighbours, from the command line."""

import json
import re

import pytest

from ragkv import bundled

from .commands import run


@pytest.fixture
def files(home, tmp_path):
    (tmp_path / "docs").mkdir()
    for name, text in list(bundled.documents().items())[:10]:
        (tmp_path / "docs" / name).write_text(text)
    return sorted((tmp_path / "docs").iterdir())


def test_a_folder_keeps_up_with_neighbours(files, capsys):
    code, _, err = run(capsys, "add", *files[:3], "--behind", 1, "--method", "reuse")
    assert code == 0 and err.startswith("to read: ") and "again" not in err
    assert run(capsys, "refresh", "--dry-run")[1] == "0 documents to be read behind other passages\n"
    assert run(capsys, "add", *files[3:])[0] == 0
    stale = json.loads(run(capsys, "refresh", "--dry-run", "--json")[1])["stale"]
    assert stale and set(stale) <= set(map(str, files[:3]))
    code, out, _ = run(capsys, "refresh", "--dry-run")
    assert out.splitlines()[0].startswith(f"{len(stale)} document") and out.splitlines()[1:] == [
        f"  {s}" for s in stale
    ]
    code, out, err = run(capsys, "refresh")
    assert code == 0 and re.match(r"[1-9]\d* tokens read in ", out)
    again = [line for line in err.splitlines() if line.endswith("again: other passages are nearest to it now")]
    assert len(again) == len(stale)
    assert run(capsys, "refresh")[1].startswith("0 tokens read")
    assert run(capsys, "refresh", "--behind", 0)[1].startswith(tuple("123456789"))
    assert run(capsys, "stats", "--json")[0] == 0
    assert run(capsys, "refresh", "--dry-run")[1].startswith("0 documents")


def test_forgetting_leaves_no_passage_in_others(files, capsys):
    """Without a model: what was read behind a document goes with it."""
    run(capsys, "add", *files, "--behind", 2, "--method", "reuse")
    before = json.loads(run(capsys, "docs", "--json")[1])["documents"]
    assert all(document["kv_bytes"] for document in before)
    assert run(capsys, "forget", files[0], "--yes")[0] == 0
    after = json.loads(run(capsys, "docs", "--json")[1])["documents"]
    held = [document["source"] for document in after if not document["kv_bytes"]]
    assert len(after) == 9 and held and run(capsys, "verify")[0] == 0
    assert set(held) <= set(json.loads(run(capsys, "refresh", "--dry-run", "--json")[1])["stale"])
