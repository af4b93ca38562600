"""Data of every form as cases: small files of our own, in the forms in which the data sets are published."""

import bz2
import hashlib
import json
import re

import numpy as np
import pytest

from ragkv import RagKVError
from ragkv.evaluation import Case, EvaluationError, read_cases
from ragkv.evaluation.cases import usable
from ragkv.evaluation.formats import FORMS, brief, cut

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
    "SQuAD": {
        "title": "Anna_Berg",
        "paragraphs": [
            {
                "context": ANNA,
                "qas": [
                    {"id": "q1", "question": "What does Anna play?", "answers": [{"text": "harp", "answer_start": 35}]}
                ],
            },
            {"context": BELL, "qas": [{"id": "q2", "question": "Where?", "answers": [], "is_impossible": True}]},
        ],
    },
}


class Words:
    """Vectors of the words of a text."""

    dimension, name, fingerprint = 256, "words", "words"

    def encode_documents(self, texts):
        counts = np.zeros((len(texts), self.dimension), np.float32)
        for count, text in zip(counts, texts, strict=True):
            for word in re.findall(r"\w+", text):
                count[hashlib.md5(word.encode()).digest()[0]] += 1
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    def encode_query(self, text):
        return self.encode_documents([text])[0]


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
    name, (case, *_) = read(tmp_path, RECORDS[form], lines=lines)
    assert name == form
    assert case.question.endswith("What does Anna play?")
    assert case.answers[0] == "harp"
    assert len(case.documents) == (1 if form == "SQuAD" else 2)
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
    squad = found["SQuAD"]
    assert (squad.documents, squad.gold) == (((f"Anna Berg\n{ANNA}", BELL),), ((0, 0),))


def test_passages_are_retrieved_from_all_articles(tmp_path, monkeypatch):
    monkeypatch.setattr("ragkv.evaluation.retrieving.offline_embedder", Words)
    words = ("alder", "birch", "cedar", "ebony", "fir", "gorse", "hazel", "iris")
    articles = [
        {
            "title": "",
            "paragraphs": [{"context": f"The {word} is {word}.", "qas": []} for word in words[half : half + 4]],
        }
        for half in (0, 4)
    ]
    asked = {"id": "a", "question": "hazel", "answers": [{"text": "hazel"}]}
    articles[0]["paragraphs"][0]["qas"] = [{**asked, "id": "c"}]
    articles[1]["paragraphs"][2]["qas"] = [asked, {**asked, "id": "b", "question": "cedar"}]
    _, (_, one, other) = read(tmp_path, *articles, top_k=1)
    assert [one.text(place) for place in one.retrieved] == ["The hazel is hazel."]
    assert one.gold == one.retrieved == ((0, 2),) and len(one.whole) == 4
    assert [other.text(place) for place in other.retrieved] == ["The cedar is cedar."]
    assert other.gold == ()  # it stands in a document that was not found
    assert other.about == one.about  # but is what it is about
    assert len(read(tmp_path, *articles)[1][0].retrieved) == 5
    articles[0]["paragraphs"][0]["qas"].insert(0, {**asked, "id": "d", "answers": [], "is_impossible": True})
    assert [case.id for case in read(tmp_path, *articles, limit=2)[1]] == ["d", "a", "c"]  # searched for no more

    _, (case,) = read(tmp_path, {**RECORDS["ragkv"], "question": "harp"}, top_k=1)
    assert [case.text(place) for place in case.retrieved] == ["She plays the harp."] and case.gold == ((0, 1),)


def test_the_first_questions_are_of_as_many_articles_and_paragraphs_as_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr("ragkv.evaluation.retrieving.offline_embedder", Words)

    def asked(name):
        return {"id": name, "question": "harp", "answers": [{"text": "harp"}]}

    articles = [
        {
            "title": title,
            "paragraphs": [
                {"context": f"The harp {title} {p}.", "qas": [asked(f"{title}{p}{q}") for q in range(2)]}
                for p in range(2)
            ],
        }
        for title in "abc"
    ]
    del articles[2]["paragraphs"][1]["qas"][1]
    of_each = ["a00 b10 c00", "a10 b00 c10", "a01 b11 c01", "a11 b01"]
    assert [case.id for case in read(tmp_path, *articles)[1]] == " ".join(of_each).split()
    assert [case.id for case in read(tmp_path, *articles, limit=3)[1]] == of_each[0].split()


def test_among_the_first_questions_every_kind_has_its_share(tmp_path):
    text = json.dumps(RECORDS["MuSiQue"])
    # As in the published file.
    ids = [f"{hops}hop__{number}" for hops, count in ((2, 6), (3, 3)) for number in range(count)]
    records = [json.loads(text.replace("plays", f"plays {i}").replace("2hop__1_2", i)) for i in ids]
    kinds = [case.kind for case in read(tmp_path, *records)[1]]
    assert [kinds[first : first + 3].count("3hop") for first in (0, 3, 6)] == [1, 1, 1]
    assert [case.id for case in read(tmp_path, *records)[1] if case.kind == "2hop"] == ids[:6]


@pytest.mark.parametrize("form", ["ragkv", "HotpotQA or 2WikiMultihopQA"])
def test_questions_of_documents_of_their_own_stay_in_the_order_of_the_file(tmp_path, form):
    def record(number):
        text = json.dumps(RECORDS[form]).replace("plays", f"plays {number}")
        return json.loads(text) | {"_id" if "Hotpot" in form else "id": str(number)}

    assert [case.id for case in read(tmp_path, *map(record, range(5)))[1]] == list("01234")


@pytest.mark.parametrize(
    ("texts", "asks"),
    [
        ("The harp is in the hall of a house.", "Only give me the answer"),
        ("Die Harfe steht in der Halle an einem Fenster.", "Gib mir nur die Antwort"),
        ("竖琴在大厅里。", "只给我答案"),
        ("พิณอยู่ในห้องโถง", "Only give me the answer"),
    ],
)
def test_short_answers_are_asked_for_in_the_language_of_the_data(tmp_path, texts, asks):
    record = {**RECORDS["SQuAD"], "paragraphs": [{**RECORDS["SQuAD"]["paragraphs"][0], "context": texts}]}
    assert brief(*read(tmp_path, record)).startswith(asks)


def test_answers_of_any_length_are_not_asked_to_be_short(tmp_path):
    assert not any(brief(*read(tmp_path, RECORDS[form])) for form in ("ragkv", "RULER"))
    longbench = RECORDS["LongBench"]
    assert brief(*read(tmp_path, longbench)) and not brief(*read(tmp_path, {**longbench, "dataset": "qmsum"}))
    assert read(tmp_path, {**longbench, "language": "zh"})[1][0].language == "zh"
    with pytest.raises(EvaluationError, match="language must be one of en, de, zh, got 'fr'"):
        read(tmp_path, {**longbench, "language": "fr"})


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


@pytest.mark.parametrize("given", [{"chunk_words": 0}, {"chunk_words": 2.5}, {"top_k": 0}, {"limit": 0}])
def test_numbers_out_of_range_are_refused(tmp_path, given):
    """Cut after no words a text would be cut for ever; no passages, or no cases, would be taken for as many as there are."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"input": "Who?", "context": "She went home.", "answers": ["she"]}]))
    with pytest.raises(RagKVError, match=next(iter(given))):
        read_cases(path, **given)


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


def test_whatever_stands_in_the_place_of_an_id_cases_are_told_apart(tmp_path):
    """What was shuffled begins with a number other than 0, whose 0 is no missing id."""
    asked = [RECORDS["RULER"] | {"index": index} for index in (5, 0, 1)]
    file = tmp_path / "ruler.jsonl"
    file.write_text("\n".join(map(json.dumps, asked)))
    assert sorted(case.id for case in read_cases(file)[1]) == ["0", "1", "5"]
    nothing = dict.fromkeys(("id", "kind", "language", "ordered", "gold", "retrieved"))
    file.write_text("\n".join([json.dumps(RECORDS["ragkv"] | nothing)] * 2))
    cases = read_cases(file)[1]
    assert [(case.id, case.kind, case.language, case.gold) for case in cases] == [
        ("0", "all", "en", ()),
        ("1", "all", "en", ()),
    ]


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("ragkv", {"answers": {"text": ["harp"], "answer_start": [3]}}),
        ("ragkv", {"answers": [True]}),
        ("ragkv", {"documents": [{"text": "Anna plays."}]}),
        ("ragkv", {"documents": "Anna plays."}),
        ("ragkv", {"question": ["Who?"]}),
        ("CacheBlend", {"ctxs": [{"title": "Anna", "text": ["She plays."]}]}),
        ("HotpotQA or 2WikiMultihopQA", {"answer": {"value": "harp", "aliases": []}}),
    ],
)
def test_what_is_no_text_is_not_taken_for_one(tmp_path, form, changes):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(RECORDS[form] | changes))
    with pytest.raises(EvaluationError, match="record 1 is not a good"):
        read_cases(file)


def test_what_is_missing_is_no_text(tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps({"data": [{"title": "Anna", "paragraphs": []}]}))
    with pytest.raises(EvaluationError, match=r"data\.json holds no question"):
        read_cases(file)
    passages = [{"title": None, "text": ANNA}, {"title": "Bell", "text": None}]
    file.write_text(json.dumps(RECORDS["CacheBlend"] | {"ctxs": passages, "question": None, "answers": [None, " ", 7]}))
    (case,) = read_cases(file)[1]
    assert (case.documents, case.question, case.answers) == (((ANNA,), ("Bell",)), "", ("7",))


def test_a_paragraph_of_hotpot_that_is_not_cut_into_sentences(tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(RECORDS["HotpotQA or 2WikiMultihopQA"] | {"context": [["Anna", ANNA]]}))
    assert read_cases(file)[1][0].documents == ((f"Anna\n{ANNA}",),)


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
