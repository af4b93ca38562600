"""LongBench's data sets: scores worked out by hand, and records as they are published, with texts of our own."""

import json

import pytest

from ragkv import PromptTemplate, bundled
from ragkv.cli import main
from ragkv.evaluation import Bench, parse_arms, read_cases
from ragkv.evaluation.cases import usable
from ragkv.evaluation.formats import brief, cut_lines
from ragkv.evaluation.longbench import DATA_SETS, classification, code_similarity, numbers, score
from ragkv.evaluation.metrics import edit_similarity
from ragkv.evaluation.scoring import Group
from ragkv.testing import tiny_model

CLASSES = ("location", "other location", "city")


def read(tmp_path, dataset, context, asked="", answers=("harp",), words=512, **more):
    record = {"input": asked, "context": context, "answers": list(answers), "length": 9, "dataset": dataset, "_id": "x"}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"language": "en", "all_classes": None, **record, **more}), encoding="utf-8")
    form, cases = read_cases(path, words)
    assert form == "LongBench" and usable(cases)[0] == cases
    return cases[0]


@pytest.mark.parametrize(
    ("answer", "gold", "share"),
    [
        ("12", "12", 1),
        ("There are 12 of them: 12, and not 15.", "12", 2 / 3),
        ("many", "12", 0),
        ("Paragraph 3", "Paragraph 3", 1),
        ("It is number 3 of 30.", "Paragraph 3", 1 / 2),
        ("Paragraph 13", "Paragraph 3", 0),
        ("段落3", "段落3", 1),
        ("3", "none", 0),
    ],
)
def test_numbers(answer, gold, share):
    assert numbers(answer, gold) == pytest.approx(share)


@pytest.mark.parametrize(
    ("answer", "gold", "share"),
    [
        ("other location", "other location", 1),  # what is a part of its name is not named by it
        ("a city, or other location", "other location", 1 / 2),
        ("other location", "location", 1 / 2),
        ("city", "location", 0),
        ("nowhere", "location", 0),
    ],
)
def test_classes(answer, gold, share):
    assert classification(answer, gold, CLASSES) == share


@pytest.mark.parametrize(
    ("answer", "similarity"),
    [
        ("return x + 1", 1),
        ("\n\nreturn x + 1\nreturn 7", 1),
        ("```python\n# the next one\nreturn x + 2\n```", 22 / 24),
        ("    return x + 1", 24 / 28),
        ("// nothing", 0),
    ],
)
def test_code(answer, similarity):
    assert code_similarity(answer, "return x + 1") == pytest.approx(similarity)


def test_edits():
    assert edit_similarity("abc", "axc") == pytest.approx(4 / 6)
    assert edit_similarity("abc", "cab") == pytest.approx(4 / 6) and edit_similarity("abc", "") == 0
    assert edit_similarity("", "") == edit_similarity("abc", "abc") == 1


def test_score_goes_by_the_name_of_the_data_set():
    assert score("hotpotqa", "a red harp", ["violin", "harp"]) == pytest.approx(2 / 3)
    assert score("hotpotqa_e", "harp", ["harp"]) == 1
    assert score("gov_report", "green red", ["red green"]) == pytest.approx(1 / 2)
    assert score("vcsum", "红楼", ["红楼梦"], "zh") == pytest.approx(4 / 5)
    assert score("triviaqa", "\nharp\nQuestion: who?", ["harp"]) == 1
    assert score("samsum", "a harp\nis played", ["harp is played"]) == pytest.approx(2 / 4)
    assert score("trec", "city\nlocation", ["city"], classes=CLASSES) == 1
    assert score("trec", "city", ["city"]) is None and score("bridge", "harp", ["harp"]) is None
    assert score("passage_count", "4 or 5", ["5"]) == score("lcc", "ab", ["bc"]) == 1 / 2
    assert len(DATA_SETS) == 21


@pytest.mark.parametrize(
    ("name", "label", "language"),
    [("passage_retrieval_en", "Paragraph ", "en"), ("passage_retrieval_zh", "段落", "zh")],
)
def test_paragraphs_keep_their_numbers(tmp_path, name, label, language):
    context = f"{label}1: Anna lives here.\n\n{label}2: The river is wide.\nParagraphs are long.\n\n{label}10: No."
    case = read(tmp_path, name, context, "Of a river.", [f"{label}2"], language=language)
    assert [document[0].split(":")[0] for document in case.documents] == [f"{label}{number}" for number in (1, 2, 10)]
    assert "Of a river." in case.question and f"{label}1" in case.question and not case.ordered
    assert brief("LongBench", [case]) == "", "how the answer shall look is said"


def test_what_asks_nothing_has_a_question(tmp_path):
    for name in ("passage_count", "gov_report", "multi_news", "vcsum"):
        case = read(tmp_path, name, "Passage 1:\nAnna.\nPassage 2:\nBell.")
        assert case.question.strip() and "{" not in case.question and brief("LongBench", [case]) == ""
        assert len(case.documents) == (1 if name == "passage_count" else 2)
    assert read(tmp_path, "gov_report", "Anna.", "Who?").question == "Who?"


@pytest.mark.parametrize("lines", [5, 40])
def test_code_is_gone_on_with(tmp_path, lines):
    """Its last lines stand in the question, and the others as they are; the language is none that people speak."""
    code = "\n".join(f"    x[{number}] = {{{number}: 'a b'}}" for number in range(lines))
    case = read(tmp_path, "lcc", f"\n{code}\n", language="python", answers=["    return x"], words=20)
    body, tail = "\n".join(case.documents[0]), case.question.split("\n\n", 1)[1]
    assert f"{body}\n{tail}" == code and tail.count("\n") == (9 if lines == 40 else 2)
    assert case.ordered and case.language == "en"
    snippets = read(tmp_path, "repobench-p", code, "def f(x):\n    y = {input}", language="java")
    assert snippets.documents[0] == (code,) and snippets.question.endswith("\n\ndef f(x):\n    y = {input}")


def test_examples_are_cut_between_lines(tmp_path):
    examples = "\n".join(f"Question: Where is number {number}?\nType: city" for number in range(30))
    case = read(tmp_path, "trec", examples, "Question: Where?\nType:", ["city"], all_classes=CLASSES)
    assert case.documents == ((examples,),) and case.classes == CLASSES
    assert case.question.endswith("\n\nQuestion: Where?\nType:")
    other = read(tmp_path, "trec", examples, "Question: Where?\nType:", ["city"], all_classes=["city"])
    assert other.fingerprint == case.fingerprint
    assert cut_lines("\n a b\n\nc\nd e f g\nh\n\n", 3) == (" a b\n\nc", "d e f", "g", "h")
    assert cut_lines("\n\n", 3) == ("",)


def test_rows_have_the_score(loaded, tmp_path, small_case):
    bench = Bench(tiny_model(vocab_size=1792), loaded[1], PromptTemplate(**bundled.TEMPLATE), max_new_tokens=3)
    arms = parse_arms(["no-context"], [])

    def row(case):
        return next(Group(bench, case, 0, bench.read(case)).rows(arms))

    case = small_case(kind="triviaqa")
    said = row(case)["answer"]
    assert row(small_case(kind="triviaqa", answers=(said,)))["longbench"] == 1
    assert "longbench" not in row(small_case(kind="cross")) and "longbench" not in row(small_case(kind="lsht"))
    named = small_case(kind="lsht", answers=("b",), classes=("b", said))
    assert (
        row(named)["longbench"] == 0 < row(small_case(kind="lsht", answers=(said,), classes=("x~", said)))["longbench"]
    )


def test_it_is_what_is_drawn(loaded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ragkv.bundled.load", lambda: loaded)
    read(tmp_path, "passage_count", "Paragraph 1: Anna.\n\nParagraph 2: Bell.\n\nParagraph 3: Anna.", answers=["2"])
    argv = ["--data", tmp_path / "data.jsonl", "--arms", "full-prefill", "--timed", 0, "--orders", 1]
    assert main(["eval", *map(str, [*argv, "--max-new-tokens", 3, "--out", tmp_path / "out"])]) == 0
    assert "LongBench by kind of question" in capsys.readouterr().out
    assert "LongBench, mean and 95 % interval" in (tmp_path / "out" / "tables.md").read_text()
