"""--remote: folders that share a pool."""

import io
import json
from argparse import Namespace

import pytest

from ragkv import bundled
from ragkv.cli.pools import pool_for_many

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


def test_a_folder_without_documents_answers_from_what_is_published(file, tmp_path, capsys, monkeypatch):
    url, question = f"file://{tmp_path}/pool", ("--max-new-tokens", "1", "Which river?")

    def asked(*more):
        return run(capsys, "ask", "--json", "--path", tmp_path / "two", "--remote", url, *more, *question)

    code, _, err = asked()
    assert code == 1 and "nothing is published" in err and "'ragkv publish" in err
    add = ("add", "--json", "--path", tmp_path / "one", "--remote", url, "--chunk-tokens", "60")
    assert run(capsys, *add, file)[0] == 0
    code, out, err = run(capsys, "publish", "--path", tmp_path / "one", "--remote", url)
    assert (code, err) == (0, "") and out.startswith("published 1 document, 3 passages, ")
    before = {path: path.read_bytes() for path in (tmp_path / "pool").rglob("*") if path.is_file()}
    code, out, err = asked()
    assert code == 0 and set(json.loads(out)["report"]["fusion"]["sources"]) == {"remote"}, err
    other = tmp_path / "other.md"
    other.write_text(bundled.documents()["clearport.md"][600:1000])
    assert {path: path.read_bytes() for path in (tmp_path / "pool").rglob("*") if path.is_file()} == before
    assert run(capsys, *add, other)[0] == 0
    code, out, _ = run(capsys, "publish", "--json", "--path", tmp_path / "one", "--remote", url)
    assert json.loads(out)["documents"] == 2 and json.loads(out)["unread"] == 0
    assert asked()[0] == 0
    assert len(json.loads(run(capsys, "docs", "--json", "--path", tmp_path / "two")[1])["documents"]) == 2
    assert asked("--namespace", "none")[0] == 1
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    chat = run(capsys, "chat", "--json", "--path", tmp_path / "three", "--remote", url)
    assert chat[0] == 0 and (tmp_path / "three" / "documents").is_dir()
    with pytest.raises(SystemExit):
        run(capsys, "publish", "--path", tmp_path / "one")


def test_what_nobody_needs_goes_from_a_pool(file, tmp_path, capsys):
    url = f"file://{tmp_path}/pool"

    def pruned(*more):
        return run(capsys, "prune", "--remote", url, *more)

    def stored():
        return len([path for path in (tmp_path / "pool").glob("??/*") if path.is_file()])

    other = tmp_path / "other.md"
    other.write_text(bundled.documents()["clearport.md"][600:1000])
    for folder, what in (("one", file), ("two", other)):
        assert run(capsys, "add", "--path", tmp_path / folder, "--remote", url, "--chunk-tokens", "60", what)[0] == 0
    count = stored()
    code, _, err = pruned("--yes", "--grace", "0s")
    assert code == 1 and "nothing is published" in err and "--older-than" in err and stored() == count
    assert run(capsys, "publish", "--path", tmp_path / "one", "--remote", url)[0] == 0
    assert pruned("--yes")[1].startswith("deleted 0 objects, 0 B; 3 needed, ")
    code, out, _ = pruned("--dry-run", "--grace", "0s", "--json")
    found = json.loads(out)
    assert (code, found["objects"], found["needed"], found["dry_run"]) == (0, count - 3, 3, True) and found["bytes"] > 0
    assert pruned("--grace", "0s")[0] == 1 and stored() == count, "nobody could be asked"
    code, out, _ = pruned("--grace", "0s", "-y")
    assert code == 0 and out.startswith(f"deleted {count - 3} object") and stored() == 3
    code, out, _ = run(
        capsys, "ask", "--json", "--path", tmp_path / "three", "--remote", url, "--max-new-tokens", "1", "Which?"
    )
    assert code == 0 and set(json.loads(out)["report"]["fusion"]["sources"]) == {"remote"}
    assert pruned("--older-than", "0s", "-y")[0] == 0 and stored() == 0
    for wrong in (
        ("--remote", url, "--orphans"),
        ("--orphans", "--grace", "1d"),
        ("--remote", url, "--grace", "1d", "--older-than", "1d"),
    ):
        with pytest.raises(SystemExit):
            run(capsys, "prune", *wrong)
    assert run(capsys, "prune", "--remote", "nowhere", "--yes")[0] == 1


def test_what_is_encrypted_takes_the_key_of_a_file_or_of_the_environment(file, tmp_path, capsys, monkeypatch):
    """For all that opens a pool; and no key is ever an argument, or shown."""
    url, secret, other = f"file://{tmp_path}/pool", "5e" * 32, "07" * 32
    for name, text in {"key": secret + "\n", "other": other, "each": json.dumps({"": secret, "team": other})}.items():
        (tmp_path / name).write_text(text)

    def does(command, folder, key, *more):
        code, out, err = run(
            capsys, command, "--path", tmp_path / folder, "--remote", url, "--remote-key-file", tmp_path / key, *more
        )
        assert secret not in out + err and other not in out + err
        return code, out, err

    add = ("--chunk-tokens", "60", "--json", file)
    ask = ("--json", "--max-new-tokens", "1", "Which river?")
    code, out, _ = does("add", "one", "key", *add)
    assert code == 0 and json.loads(out)["tokens_read"] > 0
    assert does("publish", "one", "key")[0] == 0
    code, out, _ = does("ask", "three", "key", *ask)
    assert code == 0 and set(json.loads(out)["report"]["fusion"]["sources"]) == {"remote"}
    code, _, err = does("ask", "four", "other", *ask)
    assert code == 1 and "another key" in err
    prune = ("prune", "--remote", url, "--grace", "0s", "--yes")
    assert run(capsys, *prune)[0] == 1, "without a key nobody knows what is needed"
    monkeypatch.setenv("RAGKV_REMOTE_KEY", secret)
    code, out, _ = run(capsys, *prune)
    assert code == 0 and "3 needed" in out
    assert does("prune", "one", "other", "--yes")[0] == 1, "the file of the option counts, not the environment"
    assert run(capsys, "forget", "-y", "--path", tmp_path / "one", "--remote", url, str(file))[0] == 0
    assert not list((tmp_path / "pool").glob("??/*"))
    assert pool_for_many(Namespace(remote=None, remote_key_file=None)) is None, "the environment asks for no pool"
    for key, keys in (("key", bytes.fromhex(secret)), ("each", {"": bytes.fromhex(secret), "team": b"\7" * 32})):
        opens = pool_for_many(Namespace(remote=url, remote_key_file=tmp_path / key))
        assert opens.keywords == {"encryption_key": keys}


def test_what_is_no_key_is_refused_before_anything_is_done(file, tmp_path, capsys, monkeypatch):
    url, wrong = f"file://{tmp_path}/pool", tmp_path / "wrong"
    secret = "c0ffee" * 10
    for text in (
        "",
        secret,
        "zz" * 32,
        "{}",
        f'{{"a": "{secret}"}}',
        '{"a": 1}',
        f'{{"a": "{"5e" * 32}"',
        f'["{secret}"]',
    ):
        wrong.write_text(text)
        code, _, err = run(capsys, "add", "--path", tmp_path / "one", "--remote", url, "--remote-key-file", wrong, file)
        assert code == 1 and "64 hexadecimal digits" in err and str(wrong) in err and secret not in err
    wrong.write_bytes(bytes(range(128, 160)))
    assert run(capsys, "prune", "--remote", url, "--remote-key-file", wrong)[0] == 1
    code, _, err = run(capsys, "add", "--path", tmp_path / "one", "--remote", url, "--remote-key-file", tmp_path, file)
    assert code == 1 and "--remote-key-file" in err
    for command in (("add", file), ("prune", "--orphans")):
        code, _, err = run(capsys, command[0], "--path", tmp_path / "one", "--remote-key-file", wrong, *command[1:])
        assert code == 1 and "--remote URL" in err
    monkeypatch.setenv("RAGKV_REMOTE_KEY", secret)
    code, _, err = run(capsys, "add", "--path", tmp_path / "one", "--remote", url, file)
    assert code == 1 and "RAGKV_REMOTE_KEY" in err and secret not in err
    assert not (tmp_path / "one").exists() and not (tmp_path / "pool").exists()
