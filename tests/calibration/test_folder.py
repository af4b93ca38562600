"""Calibrating a folder, from Python and from the command line."""

import json

import pytest

from ragkv import RAG, ArgumentTypeError, CalibrationError, RetrievalError, Reuse, bundled
from ragkv.cli import main
from ragkv.retrieval import offline_embedder
from tests.rag.rags import DOCUMENTS, open_rag, small_model

QUESTIONS = [question.question for question in bundled.questions()]
ASKED = {"kl": 0.6, "cap": 2.0, "ladder": ["lego-link:k=4", "reuse"], "top_k": 2}


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_questions_over_the_folder(tmp_path, model):
    with open_rag(tmp_path, model) as rag:
        rag.add_texts(list(DOCUMENTS.values())[:3], list(DOCUMENTS)[:3])
        assert rag.ask(QUESTIONS[0], max_new_tokens=1).report.fusion.method == "Reuse()"
        asked = [*QUESTIONS[:20], {"question": QUESTIONS[20], "answers": "Ash"}]
        found = rag.calibrate(asked, **ASKED)
        assert found.chosen in ("lego-link:k=4", "reuse") and 5 < found.cases <= 21
        want = f"Calibrated({'Reuse()' if found.chosen == 'reuse' else 'LegoLink(k=4)'})"
        assert rag.ask(QUESTIONS[0], max_new_tokens=1).report.fusion.method == want
        assert rag.session().ask(QUESTIONS[0], max_new_tokens=1).report.fusion.method == want
        assert rag.retriever.catalogue.defaults["method"] == "calibrated"
        rag.add_texts(["Draycliff is a town."], ["new"])
        assert rag.retriever.catalogue.defaults["method"] == "calibrated"
    with open_rag(tmp_path, model, method="calibrated") as rag:
        assert rag.ask(QUESTIONS[0], max_new_tokens=1).report.fusion.method == want


def test_where_nothing_is_proved_the_method_stays(model):
    with open_rag(model=model) as rag:
        rag.add_texts(list(DOCUMENTS.values())[:2], list(DOCUMENTS)[:2])
        found = rag.calibrate(QUESTIONS[:6], kl=1e-9, cap=2e-9, ladder=["reuse"], top_k=3)
        assert found.chosen == "full-prefill" and rag.engine.method == Reuse()


def test_what_cannot_be_calibrated(model):
    with open_rag(model=model) as rag:
        with pytest.raises(RetrievalError, match="there are none: add some first"):
            rag.calibrate(QUESTIONS)
        rag.add_texts(["Draycliff is a town."])
        with pytest.raises(ArgumentTypeError, match="each of cases must be"):
            rag.calibrate([{"question": " "}] * 50)
        with pytest.raises(CalibrationError, match=r"none of the 9 cases could be asked.*no passage was found"):
            rag.calibrate(QUESTIONS[:9], kl=0.5, min_score=2.0)


def test_a_question_is_looked_for_once_and_where_it_is_too_long_not_at_all(model, monkeypatch):
    looked = []
    with open_rag(model=model) as rag:
        rag.add_texts(["Draycliff is a town.", "Clearport lies on the Tees."])
        encode = rag.retriever.embedder.encode_query
        monkeypatch.setattr(rag.retriever.embedder, "encode_query", lambda text: (looked.append(text), encode(text))[1])
        long = "word " * rag.engine.decoder.max_positions
        found = rag.calibrate([*QUESTIONS[:9], *[long] * 9], kl=0.5, ladder=["reuse"], top_k=1)
    assert found.left_out["longer than the model's positions"] and long not in looked
    assert sorted(looked) == sorted(set(looked)) and len(looked) == found.cases


@pytest.mark.parametrize(
    "more", [{"answers": True}, {"answers": {"text": ["Tees"]}}, {"documents": [["It lies there."]]}]
)
def test_what_is_no_question_over_a_folder_is_refused(model, more):
    """Nor are documents that a record brings passed over."""
    with open_rag(model=model) as rag:
        rag.add_texts(["Draycliff is a town."])
        with pytest.raises(ArgumentTypeError, match="each of cases must be"):
            rag.calibrate([{"question": "Where is it?", **more}] * 50)


@pytest.fixture
def home(tmp_path, monkeypatch, model):
    embedder = offline_embedder()
    loaded = bundled.load()
    monkeypatch.setattr("ragkv.bundled.load", lambda: loaded)
    monkeypatch.setattr("ragkv.retrieval.retriever.offline_embedder", lambda: embedder)
    monkeypatch.setenv("RAGKV_HOME", str(tmp_path / "home"))
    return tmp_path


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(capsys, *argv):
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_on_the_command_line(home, capsys):
    (home / "a.md").write_text(DOCUMENTS["clearport.md"])
    (home / "b.md").write_text(DOCUMENTS["blackstead.md"])
    assert run(capsys, "add", home / "a.md", home / "b.md")[0] == 0
    data = lines(home / "mine.jsonl", *({"question": question} for question in QUESTIONS[:20]))
    told = ("calibrate", "--data", data, "--top-k", 2, "--ladder", "reuse", "--kl", 0.5, "--cap", 1.5)
    code, out, err = run(capsys, *told)
    assert (code, err) == (0, "")
    assert "each counted as 1.5 at most: under 0.5 with 95% confidence" in out
    assert "\nreuse" in out and "under" in out and "chosen: reuse, behind " in out
    assert "answers by it from now on; --method says otherwise" in out
    code, out, _ = run(capsys, "ask", QUESTIONS[0], "--max-new-tokens", 1)
    assert code == 0 and "by Calibrated(Reuse())" in out
    assert "method: calibrated" in run(capsys, "stats")[1]
    assert "by Reuse()" in run(capsys, "ask", QUESTIONS[0], "--max-new-tokens", 1, "--method", "reuse")[1]

    code, out, _ = run(capsys, *told, "--json")
    found = json.loads(out)
    assert (code, found["data"], found["chosen"]) == (0, "mine.jsonl (questions)", "reuse")
    assert found["rungs"][0]["verdict"] == "under" and found["made_with"]["context"] == "document"

    # What was chosen does not travel with a file of the folder: it was proved for this one's.
    assert run(capsys, "export", home / "file.tar")[0] == 0
    assert run(capsys, "import", home / "file.tar", "--path", home / "other")[0] == 0
    code, out, _ = run(capsys, "ask", QUESTIONS[0], "--max-new-tokens", 1, "--path", home / "other")
    assert code == 0 and "by RelevantTokens" in out


def test_data_that_brings_its_documents(home, capsys):
    record = {"question": "Where is it?", "answers": ["Tees"], "retrieved": [[1, 0], [0, 0]]}
    data = lines(
        home / "cases.jsonl",
        *({**record, "documents": [[f"Draycliff {n} is a town."], ["It lies on the Tees."]]} for n in range(9)),
    )
    code, out, err = run(
        capsys, *("calibrate", "--data", data, "--f1", 0.4, "--ladder", "reuse", "--max-new-tokens", 2, "--json")
    )
    found = json.loads(out)
    assert (code, err, found["metric"], found["given"]) == (0, "", "f1", 9) and "ragkv" in found["data"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "a?"}\n{"question": 3}\n', 'line 2 must be {"question": "...", "answers": [...]}'),
        ('{"question": "a?"}\n["question"]\n', "line 2 must be"),
        ('\n{"question": "a?"}\n\n["question"]\n', "line 4 must be"),
        ("", "it is empty"),
        ('{"nothing": 1}\n', 'or of lines {"question": ...}'),
        ('{"question": "a?"}\n' * 5, "no documents in "),
    ],
)
def test_bad_data(home, capsys, text, said):
    (home / "data.jsonl").write_text(text)
    code, _, err = run(capsys, "calibrate", "--data", home / "data.jsonl")
    assert code == 1 and said in err


def test_bad_options(home, capsys):
    data = lines(home / "mine.jsonl", {"question": "a?"})
    with RAG.from_pretrained(path=home / "home" / "default") as rag:
        rag.add_texts(["Draycliff is a town."])
    for options, said in (
        (["--kl", "nan"], "kl must be more than 0"),
        (["--ladder", "nonsense"], "no method 'nonsense'"),
        (["--confidence", "1"], "confidence must be between"),
    ):
        code, _, err = run(capsys, "calibrate", "--data", data, *options)
        assert code == 1 and said in err
    with pytest.raises(SystemExit):
        run(capsys, "calibrate", "--data", data, "--kl", 0.1, "--f1", 0.1)
    assert "not allowed with" in capsys.readouterr().err


def test_interrupted(home, capsys, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt

    (home / "a.md").write_text(DOCUMENTS["clearport.md"])
    assert run(capsys, "add", home / "a.md")[0] == 0
    monkeypatch.setattr("ragkv.calibration.run._Run.result", stop)
    data = lines(home / "mine.jsonl", {"question": "a?"})
    code, _, err = run(capsys, "calibrate", "--data", data)
    assert (code, err) == (
        130,
        "ragkv: interrupted: what was measured is kept, and the same command goes on from there\n",
    )
