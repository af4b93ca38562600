"""--remote: folders that share a pool."""

import json

import pytest

from ragkv import bundled

from .commands import run

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "clearport.md"
    path.write_text(bundled.documents()["clearport.md"][:600])
    return path


def test_what_one_folder_read_another_takes_from_the_pool(file, tmp_path, capsys):
    url = f"file://{tmp_path}/pool"

    def added(folder, *more):
        code, out, err = run(capsys, "add", "--json", "--path", tmp_path / folder, "--remote", url, file, *more)
        assert code == 0 and "still to be sent" not in err
        return json.loads(out)["tokens_read"]

    assert added("one") > 0 and added("two") == 0
    question = ("ask", "--json", "--path", tmp_path / "two", "--remote", url, "--max-new-tokens", "1", "Which river?")
    code, out, _ = run(capsys, *question)
    assert code == 0 and set(json.loads(out)["report"]["fusion"]["sources"]) <= {"remote", "disk", "cpu"}
    assert run(capsys, "forget", "--path", tmp_path / "two", "--remote", "nowhere", "-y", str(file))[0] == 1
    assert run(capsys, "forget", "--path", tmp_path / "two", "--remote", url, "-y", str(file))[0] == 0
    assert not [path for path in (tmp_path / "pool").rglob("*") if path.is_file()]


def test_a_pool_that_is_away_is_said_and_holds_nothing_up(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ragkv.cli.opening._PATIENCE_S", 0.1)
    code, _, err = run(capsys, "add", "--path", tmp_path / "one", "--remote", "redis://127.0.0.1:1", file)
    assert code == 0 and "still to be sent to the pool" in err
    url = f"file://{tmp_path}/pool"
    assert run(capsys, "refresh", "--path", tmp_path / "one", "--remote", url)[0] == 0
    assert [path for path in (tmp_path / "pool").rglob("*") if path.is_file()], "what was noted was not sent later"
