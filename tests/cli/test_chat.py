"""ragkv chat: a line a question, one conversation, as people and programs use it."""

import io
import json

import pytest

from ragkv import bundled
from ragkv.cli import main


@pytest.fixture(autouse=True)
def town(home, tmp_path, capsys):
    (tmp_path / "clearport.md").write_text(bundled.documents()["clearport.md"])
    assert main(["add", str(tmp_path / "clearport.md")]) == 0
    capsys.readouterr()


def talked(capsys, monkeypatch, text, *argv):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code = main(["chat", "--max-new-tokens", "6", *argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


RIVER, MAYOR = "On which river does Clearport lie?", "Who governs Clearport?"


def test_lines_are_turns_of_one_conversation(capsys, monkeypatch):
    code, out, err = talked(capsys, monkeypatch, f"{RIVER}\n\n  {MAYOR}\n/new\n{RIVER}\n/quit\n{MAYOR}\n", "--json")
    first, second, anew = map(json.loads, out.splitlines())
    assert (code, err) == (0, "") and first["answer"] == anew["answer"] == "Exe"
    assert {source["kv"] for source in first["sources"]} <= {"disk", "cpu"}
    assert {source["kv"] for source in second["sources"]} == {"prompt"}, "what stands in the prompt is not placed again"
    assert second["report"]["fusion"]["reused_tokens"] > first["report"]["fusion"]["chunk_tokens"]
    assert anew["report"]["fusion"]["reused_tokens"] < second["report"]["fusion"]["reused_tokens"]


def test_sources_on_request(capsys, monkeypatch):
    code, out, err = talked(capsys, monkeypatch, f"/sources\n{RIVER}\n/sources\n/what\n")
    assert code == 0 and out.startswith("Exe\n\nsources\n") and out.count("clearport.md") >= 1
    assert err.startswith("nothing was answered yet\n") and "/new" in err
    assert talked(capsys, monkeypatch, f"{RIVER}\n", "--sources")[1].startswith("Exe\n\nsources\n")


def test_question_that_fails_ends_nothing(capsys, monkeypatch):
    code, out, err = talked(capsys, monkeypatch, f"{RIVER}\n{'why ' * 3000}\n{RIVER}\n")
    assert code == 1 and out.splitlines()[0] == "Exe" and len(out.splitlines()) == 2
    assert err.startswith("ragkv: ") and "positions" in err


def test_interrupt_stops_one_answer(capsys, monkeypatch):
    from ragkv.session import Session

    stream, asked = Session.stream, []

    def interrupted(session, question, **options):
        sources, pieces = stream(session, question, **options)
        asked.append(question)
        if len(asked) == 2:
            next(pieces)
            raise KeyboardInterrupt
        return sources, pieces

    monkeypatch.setattr(Session, "stream", interrupted)
    code, out, err = talked(capsys, monkeypatch, f"{RIVER}\n{MAYOR}\n{RIVER}\n")
    assert (code, len(asked)) == (0, 3) and out.splitlines()[0] == "Exe" and len(out.splitlines()) == 2
    assert err == "\nstopped: question and answer are no part of the conversation\n"


def test_conversation_is_bounded(capsys, monkeypatch):
    _, out, _ = talked(capsys, monkeypatch, f"{RIVER}\n" * 3, "--json", "--context-tokens", "420")
    reused = [json.loads(line)["report"]["fusion"]["reused_tokens"] for line in out.splitlines()]
    assert len(reused) == 3 and max(reused) < 420
    with pytest.raises(SystemExit):
        main(["chat", "--context-tokens", "0"])
