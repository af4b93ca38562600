"""ragkv ask --batch: a file of questions, a file of answers, and what a stopped run leaves."""

import json
import signal
import threading

import pytest

from ragkv import RAG, bundled
from ragkv.cli import main

from .commands import run

OPTIONS = ("--max-new-tokens", 6, "--top-k", 2)
RIVER, MAYOR, LONG = "On which river does Clearport lie?", "Who governs Clearport?", "why " * 3000


@pytest.fixture(scope="module")
def town(loaded, tmp_path_factory):
    """A folder with documents, some of them in a namespace too."""
    folder = tmp_path_factory.mktemp("town")
    for name in ("clearport.md", "blackstead.md"):
        (folder / name).write_text(bundled.documents()[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragkv.bundled.load", lambda: loaded[0])
        patch.setattr("ragkv.retrieval.retriever.offline_embedder", lambda: loaded[1])
        with RAG.from_pretrained(path=folder / "kept") as rag:
            rag.add_files([folder / "clearport.md", folder / "blackstead.md"])
            rag.add_files(folder / "blackstead.md", namespace="b")
    return folder


@pytest.fixture(autouse=True)
def workplace(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def batch(town, tmp_path, capsys):
    """Asks questions: objects, or lines as they are; gives the exit code, stdout and stderr."""

    def asked(questions, *argv):
        lines = [one if isinstance(one, str) else json.dumps(one) for one in questions]
        (tmp_path / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
        files = ["--batch", "questions.jsonl", "--out", "answers.jsonl", "--path", town / "kept"]
        return run(capsys, "ask", *files, *OPTIONS, *argv)

    return asked


@pytest.fixture
def answers(tmp_path):
    """The lines of the file of answers, by id."""

    def read():
        lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert len({record["id"] for record in records}) == len(records)
        return {record["id"]: record for record in records}

    return read


def test_lines_say_what_single_answers_say(batch, answers, town, capsys):
    code, out, err = batch([{"question": RIVER}, "", {"id": "mayor", "question": MAYOR}])
    assert (code, err) == (0, "") and out.startswith("questions: 2 answered in ")
    assert out.endswith("; answers are in answers.jsonl\n")
    found = answers()
    assert list(found) in ([1, "mayor"], ["mayor", 1])
    for line in found.values():
        _, alone, _ = run(capsys, "ask", line["question"], *OPTIONS, "--path", town / "kept", "--json")
        alone = json.loads(alone)
        assert line.keys() - alone.keys() == {"id", "settings"} and alone.keys() <= line.keys()
        assert [line[name] for name in ("answer", "left_out")] == [alone[name] for name in ("answer", "left_out")]
        passages = [
            [(one["source"], one["position"], one["text"]) for one in each["sources"]] for each in (line, alone)
        ]
        assert passages[0] == passages[1] and len(passages[0]) == 2
        assert line["milliseconds"]["total"] >= line["milliseconds"]["first_token"] > 0


def test_what_is_answered_is_not_asked_again(batch, answers, tmp_path, monkeypatch):
    batch([{"question": RIVER}])
    before = (tmp_path / "answers.jsonl").read_bytes()
    asked, ask = [], RAG.ask
    monkeypatch.setattr(
        RAG, "ask", lambda self, question, **more: asked.append(question) or ask(self, question, **more)
    )
    _, out, err = batch([{"question": RIVER}], "--json", "--progress")
    assert json.loads(out)["before"] == 1 and "1/1" in err
    code, out, _ = batch([{"question": RIVER}, {"question": MAYOR}], "--json", "--at-once", 2, "--lookup", 3)
    assert code == 0 and asked == [MAYOR]
    said = json.loads(out)
    assert (said["answered"], said["before"], said["failed"]) == (1, 1, 0) and said["out"].endswith("answers.jsonl")
    assert (tmp_path / "answers.jsonl").read_bytes().startswith(before) and answers().keys() == {1, 2}


def test_question_that_fails_is_a_line_and_is_asked_again(batch, answers, monkeypatch):
    questions = [
        {"question": RIVER},
        {"id": "long", "question": LONG},
        {"id": "none", "question": MAYOR, "namespace": "x"},
    ]
    code, out, err = batch(questions)
    assert code == 1 and out.startswith("questions: 1 answered in ") and ", 2 failed; " in out
    assert sorted(line.split(":")[1] for line in err.splitlines()) == [" question long", " question none"]
    found = answers()
    assert found[1]["answer"] and "error" not in found[1]
    assert found["long"]["error"]["type"] == "PromptTooLongError" and "positions" in found["long"]["error"]["message"]
    assert "no documents in namespace 'x'" in found["none"]["error"]["message"] and "answer" not in found["none"]

    asked, ask = [], RAG.ask

    def shorter(self, question, **more):
        asked.append(question)
        return ask(self, question[:200], **more)

    monkeypatch.setattr(RAG, "ask", shorter)
    assert batch(questions)[0] == 1 and sorted(asked) == sorted([LONG, MAYOR])
    assert "error" not in answers()["long"] and "error" in answers()["none"]


def test_many_failures_are_named_up_to_a_number(batch):
    code, out, err = batch([{"question": RIVER, "namespace": "x"}] * 9, "--at-once", 3)
    assert code == 1 and ", 9 failed; " in out
    assert err.count("ragkv: question ") == 5 and err.endswith("... and others\n")


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_stopped_run_loses_nothing(how, batch, answers, tmp_path, monkeypatch, interruptible):
    """Ctrl-C while questions are worked on: those have no line. A kill may leave half a line, which goes."""
    questions, ask = [{"question": f"{RIVER} {number}"} for number in range(5)], RAG.ask

    def stopped(self, question, **more):
        if question.endswith("2"):
            [stop] = more["stopping_criteria"]
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert stop.wait(10)
        return ask(self, question, **more)

    monkeypatch.setattr(RAG, "ask", stopped)
    code, out, err = batch(questions, "--at-once", 1)
    assert (code, out) == (130, "")
    assert err == "ragkv: interrupted: what was answered is kept, and the same command goes on from there\n"
    assert answers().keys() == {1, 2}
    if how == "kill":
        with (tmp_path / "answers.jsonl").open("a") as file:
            file.write('{"id": 3, "question": "On wh')
    monkeypatch.setattr(RAG, "ask", ask)
    code, out, _ = batch(questions)
    assert code == 0 and ", 2 before; " in out and answers().keys() == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("written", ["{", '{"id": 2, "question"', "all of it"])
def test_line_that_was_cut_anywhere(written, batch, answers, tmp_path):
    """Up to the end of line, which alone may be missing too."""
    path = tmp_path / "answers.jsonl"
    batch([{"question": RIVER}, {"question": MAYOR}])
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(first + b"\n" + (second if written == "all of it" else written.encode()))
    kept = 2 if written == "all of it" else 1
    assert json.loads(batch([{"question": RIVER}, {"question": MAYOR}], "--json")[1])["before"] == kept
    assert answers().keys() == {1, 2} and path.read_bytes().startswith(first + b"\n")


def test_file_of_something_else_stays_as_it_is(batch, tmp_path):
    for text in ("notes", "notes\n", '{"question": "a"}\n', '{"id": 1, "question": "a"}', '{"id": 1}\n{"id": 2'):
        (tmp_path / "answers.jsonl").write_text(text)
        code, out, err = batch([{"question": RIVER}])
        assert (code, out) == (1, "") and "line 1 is no answer of 'ragkv ask --batch'" in err and "--out" in err
        assert (tmp_path / "answers.jsonl").read_text() == text


def test_answers_of_other_questions_or_settings_are_refused(batch, tmp_path, monkeypatch):
    batch([{"question": RIVER}])
    before = (tmp_path / "answers.jsonl").read_bytes()

    def refused(question, *options):
        code, out, err = batch([question], *options)
        assert (code, out) == (1, "") and err.endswith("give another file with --out\n")
        assert (tmp_path / "answers.jsonl").read_bytes() == before
        return err

    same = {"question": RIVER}
    assert f"line 1 answers another question than those asked now, 1: '{RIVER}'" in refused({"question": MAYOR})
    assert "another question" in refused({"id": "a", "question": RIVER})
    assert "another question" in refused({**same, "where": "source=clearport.md"})
    assert "other settings (top_k: 2 there, 3 now)" in refused(same, "--top-k", 3)
    assert "method: 'relevant-tokens:keep_document=True' there, 'reuse' now" in refused(same, "--method", "reuse")
    assert "max_new_tokens: 6 there, 7 now; stop: [] there" in refused(same, "--stop", "x", "--max-new-tokens", 7)
    monkeypatch.setattr("ragkv.calibration.kept.setting", lambda documents: "other")
    assert "model and template: '" in refused(same) and batch([same], "--out", "more.jsonl")[0] == 0


def test_bad_lines_are_named_before_anything_is_asked(batch, tmp_path, monkeypatch):
    monkeypatch.setattr("ragkv.cli.batch.open_rag", None)
    lines = [
        {"question": RIVER, "id": 4},
        "no JSON",
        [],
        {"question": " "},
        {"question": RIVER, "top_k": 3},
        {"question": RIVER, "id": 4},
        {"question": RIVER, "id": True},
    ]
    code, out, err = batch(lines)
    assert (code, out) == (1, "") and err.count("\n") == 1 and not (tmp_path / "answers.jsonl").exists()
    for said in (
        "line 2 is no JSON object; line 3 is no JSON object",
        'line 4 has no text under "question"',
        "line 5 has 'top_k', and holds question, id, namespace and where only",
        "line 6 has the id 4 of line 1; and 1 more",
    ):
        assert said in err
    for line, said in (
        ({"question": RIVER, "id": [1]}, "line 1 has an id that is no text and no whole number: [1]"),
        ({"question": RIVER, "namespace": 3}, "has a namespace that is no text: 3"),
        ({"question": RIVER, "where": 3}, "has a where that is no text and no object: 3"),
        ({"question": RIVER, "where": "kind"}, "has a bad where: must be NAME"),
        ({"question": RIVER, "where": {"year": {"$near": 3}}}, "has a bad where: where: 'year' takes a value"),
        ("", "questions.jsonl holds no question"),
    ):
        assert said in batch([line])[2]


def test_questions_may_be_of_documents_of_their_own(batch, answers, town):
    questions = [
        {"id": "text", "question": "Where is it?", "where": "source=*stead.md"},
        {"id": "object", "question": "Where is it?", "where": {"source": str(town / "blackstead.md")}},
        {"id": "own", "question": "Where is Clearport?", "namespace": "b"},
        {"id": "both", "question": "Where is Clearport?", "namespace": "b", "where": "source=*stead.md"},
    ]
    code, _, err = batch(questions)
    assert (code, err) == (0, "")
    for line in answers().values():
        assert {source["source"] for source in line["sources"]} == {str(town / "blackstead.md")}
    assert answers()["own"]["namespace"] == "b" and answers()["text"]["where"] == "source=*stead.md"
    code, _, err = batch(
        [{"question": "Where is it?", "namespace": "b", "where": "source=clearport.md"}], "--out", "more"
    )
    assert code == 1 and "no document is called 'clearport.md'" in err


def test_schema_and_logprobs_hold_for_all(batch, answers, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps({"enum": ["Exe", "Blackstead"]}))
    assert batch([{"question": RIVER}], "--schema", "schema.json", "--logprobs", "2")[0] == 0
    assert answers()[1]["value"] in ("Exe", "Blackstead")
    assert all(one["logprob"] <= 0 for one in answers()[1]["logprobs"])
    (tmp_path / "answers.jsonl").unlink()
    code, _, err = batch([{"question": RIVER}], "--schema", "schema.json", "--max-new-tokens", 1)
    assert code == 1 and "the answer ended before it was whole JSON" in err
    line = answers()[1]
    assert line["error"]["type"] == "IncompleteAnswerError" and line["value"] is None and line["sources"]


def test_what_holds_for_all_is_checked_before_anything_is_asked(batch, tmp_path, monkeypatch):
    monkeypatch.setattr(RAG, "ask", None)
    (tmp_path / "schema.json").write_text('{"type": "nothing"}')
    for options, message in (
        (("--where", "source=nowhere.md"), "no document is called 'nowhere.md'"),
        (("--schema", "schema.json"), "schema"),
        (("--out", "nowhere/answers.jsonl"), "must name a file in a folder that is there"),
        (("--out", "."), "must name a file"),
        (("--batch", "nowhere.jsonl"), "nowhere.jsonl"),
    ):
        code, out, err = batch([{"question": RIVER}], *options)
        assert (code, out, err.count("\n")) == (1, "", 1) and message in err, (options, err)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "give a QUESTION, or --batch FILE"),
        (["what?", "--batch", "q", "--out", "a"], "give a QUESTION, or --batch FILE"),
        (["--batch", "q"], "needs --out FILE"),
        (["--batch", "q", "--out", "q"], "the questions and their answers cannot be one file"),
        (["--batch", "q", "--out", "a", "--report", "r"], "--report is an option of a single QUESTION"),
        (["--batch", "q", "--out", "a", "--force"], "--force is an option of a single QUESTION"),
        (["--batch", "q", "--out", "a", "--at-once", "0"], "whole number of at least 1, got '0'"),
        (["what?", "--out", "a"], "--out is an option of --batch"),
        (["what?", "--at-once", "3"], "--at-once is an option of --batch"),
    ],
)
def test_usage(argv, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["ask", *argv])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "") and reason in err and err.startswith("usage: ragkv ask ")
