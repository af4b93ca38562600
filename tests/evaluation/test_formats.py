"""Data of every form as cases: small files of our own, in the forms in which the data sets are published."""

import bz2
import json

import pytest

from ragkv.evaluation import Case, EvaluationError, read_cases
from ragkv.evaluation.cases import usable
from ragkv.evaluation.formats import FORMS, cut

ANNA, BELL = "Anna was born in Oslo. She plays the harp.", "Oslo lies in Norway."

RECORDS = {
    "ragkv": {
        "id": "a",
        "kind": "cross",
        "question": "What does Anna play?",
        "answers": ["harp", "the harp"],
        "documents": [["Anna was born in Oslo.", "She plays the harp."], BELL],
        "retrieved": [[1, 0], [0, 1]],
        "gold": [[0, 1]],
    },
    "CacheBlend": {
        "ctxs": [{"title": "Anna", "text": ANNA}, {"title": "", "text": BELL}],
        "question": "What does Anna play?",
        "answers": ["harp", "the harp"],
    },
    "LongBench": {
        "input": "What does Anna play?",
        "context": f"Passage 1:\nAnna\n{ANNA}\n\nPassage 2:\n{BELL}\n",
        "answers": ["harp", "the harp"],
        "length": 12,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": "x1",
    },
    "MuSiQue": {
        "id": "2hop__1_2",
        "paragraphs": [
            {"idx": 0, "title": "Anna", "paragraph_text": ANNA, "is_supporting": True},
            {"idx": 1, "title": "Oslo", "paragraph_text": BELL, "is_supporting": False},
        ],
        "question": "What does Anna play?",
        "answer": "harp",
        "answer_aliases": ["the harp"],
        "answerable": True,
    },
    "HotpotQA or 2WikiMultihopQA": {
        "_id": "5a",
        "type": "bridge",
        "question": "What does Anna play?",
        "answer": "harp",
        "supporting_facts": [["Anna", 1]],
        "context": [["Anna", ["Anna was born in Oslo.", " She plays the harp."]], ["Oslo", [BELL]]],
    },
    "RULER": {
        "index": 3,
        "input": f"Answer by the given documents.\n\nDocument 1:\n{ANNA}\n\nDocument 2:\n{BELL}\n\nQuestion: What does Anna play?",
        "outputs": ["harp", "the harp"],
        "length": 30,
    },
}


def read(tmp_path, *records, lines=True, **options) -> tuple[str, list[Case]]:
    path = tmp_path / "data"
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(list(records), indent=1)
    path.write_text(text, encoding="utf-8")
    return read_cases(path, **options)


def test_every_form_has_a_record_here():
    assert {form.name for form in FORMS} == set(RECORDS)


@pytest.mark.parametrize("lines", [True, False], ids=["JSON lines", "JSON"])
@pytest.mark.parametrize("form", RECORDS)
def test_forms_are_seen_from_their_content(tmp_path, form, lines):
    name, (case,) = read(tmp_path, RECORDS[form], lines=lines)
    assert name == form
    assert case.question.endswith("What does Anna play?")
    assert case.answers[0] == "harp"
    assert len(case.documents) == 2
    texts = [case.text(place) for place in case.whole]
    assert any("She plays the harp." in text for text in texts) and any(BELL in text for text in texts)


def test_what_a_form_says_is_kept(tmp_path):
    found = {form: read(tmp_path, record)[1][0] for form, record in RECORDS.items()}
    assert found["ragkv"].retrieved == ((1, 0), (0, 1)) and found["ragkv"].gold == ((0, 1),)
    assert found["ragkv"].whole == ((1, 0), (0, 0), (0, 1))
    assert found["CacheBlend"].documents == ((f"Anna\n{ANNA}",), (BELL,))
    assert (found["LongBench"].id, found["LongBench"].kind) == ("x1", "hotpotqa")
    assert (found["MuSiQue"].kind, found["MuSiQue"].gold) == ("2hop", ((0, 0),))
    assert found["MuSiQue"].answers == ("harp", "the harp")
    hotpot = found["HotpotQA or 2WikiMultihopQA"]
    assert (hotpot.kind, hotpot.gold, hotpot.documents[0]) == ("bridge", ((0, 0),), (f"Anna\n{ANNA}",))
    assert found["RULER"].documents == ((ANNA,), (BELL,))


def test_hotpot_with_columns_as_in_its_parquet_files(tmp_path):
    record = dict(RECORDS["HotpotQA or 2WikiMultihopQA"])
    plain = read(tmp_path, record)[1][0]
    record["context"] = {"title": ["Anna", "Oslo"], "sentences": [text for _, text in record["context"]]}
    record["supporting_facts"] = {"title": ["Anna"], "sent_id": [1]}
    assert read(tmp_path, record)[1][0] == plain


def test_a_haystack_without_documents_is_one_document_in_chunks(tmp_path):
    haystack = " ".join(f"Line {number} says nothing." for number in range(40))
    _, (case,) = read(tmp_path, {"input": f"{haystack}\nWhat is said?", "outputs": ["nothing"]}, chunk_words=30)
    assert case.question == "What is said?"
    assert len(case.documents) == 1 and len(case.documents[0]) > 3
    assert " ".join(case.documents[0]) == haystack


def test_long_passages_are_cut_at_sentences():
    text = "One two three. Four five. " + "six " * 9 + "seven."
    assert cut(text, 5) == ("One two three. Four five.", "six six six six six", "six six six six seven.")
    assert cut("", 5) == ("",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("question,answer\nwho,me\n", "it begins with 'question,answer'"),
        ('{"prompt": "who"}', 'it begins with \'{"prompt": "who"}\''),
        ("[1, 2]", "LongBench \\(input, context, answers\\)"),
    ],
)
def test_an_unknown_form(tmp_path, text, reason):
    path = tmp_path / "data"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=reason):
        read_cases(path)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_only_an_end_of_line_ends_a_record(tmp_path, line_end):
    """A text may hold what Unicode calls a line end, unescaped (https://jsonlines.org)."""
    record = {**RECORDS["ragkv"], "question": "a\u2028b\x85c"}
    (tmp_path / "data").write_bytes(line_end.join([json.dumps(record, ensure_ascii=False)] * 2).encode())
    assert [case.question for case in read_cases(tmp_path / "data")[1]] == [record["question"]] * 2


def test_packed(tmp_path):
    text = "\n".join(map(json.dumps, [RECORDS["MuSiQue"]] * 2))
    (tmp_path / "data.jsonl.bz2").write_bytes(bz2.compress(text.encode()))
    assert read_cases(tmp_path / "data.jsonl.bz2") == read(tmp_path, *[RECORDS["MuSiQue"]] * 2)


@pytest.mark.parametrize("name", ["data", "data.bz2"])
@pytest.mark.parametrize("data", [b"\xff\xfe\x00\x81", bz2.compress(b"\xff"), bz2.compress(b"[]")[:-3]])
def test_what_is_no_text(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(EvaluationError, match=f"{name} is not text in UTF-8"):
        read_cases(tmp_path / name)


@pytest.mark.parametrize(
    "second", [{"question": "who?"}, {**RECORDS["ragkv"], "documents": 7}, {**RECORDS["ragkv"], "retrieved": [[5, 0]]}]
)
def test_a_bad_record_is_named(tmp_path, second):
    with pytest.raises(EvaluationError, match="record 2"):
        read(tmp_path, RECORDS["ragkv"], second)


def test_cases_that_cannot_be_scored_are_counted(tmp_path):
    good = RECORDS["ragkv"]
    records = [
        good,
        {**good, "id": "b", "answers": []},
        {**good, "id": "c", "answers": [" "]},
        {**good, "id": "d", "question": " "},
        {**good, "id": "e", "retrieved": []},
        {**good, "id": "f", "documents": [["Anna", " "], "x"]},
    ]
    kept, left_out = usable(read(tmp_path, *records)[1])
    assert [case.id for case in kept] == ["a"]
    assert left_out == {"no answer": 2, "no question": 1, "no passages, or an empty one": 2}
    with pytest.raises(EvaluationError, match=r"no case can be scored; left out: .*'no answer': 2"):
        usable(read(tmp_path, *records[1:3])[1])
    with pytest.raises(EvaluationError, match="'a' among them"):
        usable(read(tmp_path, good, good)[1])


def test_musique_without_answer_is_left_out(tmp_path):
    record = {**RECORDS["MuSiQue"], "answerable": False}
    assert read(tmp_path, record)[1][0].answers == ()
