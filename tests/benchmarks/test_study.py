"""The study's sets and tables; asking itself is ``ragkv eval``."""

import json

import pytest

from ragkv import PromptTemplate, bundled
from ragkv.evaluation import Bench, Case
from ragkv.evaluation.cases import everything
from ragkv.testing import tiny_model
from tests.scripts import load

study, unnamed, ceiling = load("study"), load("unnamed"), load("ceiling")


@pytest.mark.parametrize(
    ("title", "text", "wanted"),
    [
        ("Nikola_Tesla", "He was born in 1856.", True),
        ("Nikola_Tesla", "In 1881 he moved to Budapest.", True),
        ("Nikola_Tesla", "In 1881 Tesla moved to Budapest.", False),
        ("Nikola_Tesla", "Their names were Tesla and Edison.", True),
        ("The", "He was born in 1856.", False),  # no word to look for
        ("Nikola_Tesla", "Hence Tesla left.", False),
    ],
)
def test_a_passage_that_does_not_name_its_subject(title, text, wanted):
    assert unnamed.unnamed(title, text) is wanted


def test_musique_paragraphs_are_parted_from_their_titles():
    record = {
        "id": "2hop__1",
        "question": "Who?",
        "answer": "Anna",
        "answer_aliases": ["Anna B."],
        "paragraphs": [
            {"title": "Oslo", "paragraph_text": "Oslo lies in Norway.", "is_supporting": False},
            {"title": "Anna Berg", "paragraph_text": "She plays the harp.", "is_supporting": True},
        ],
    }
    (case,) = unnamed.of_musique([record])
    assert case["documents"][1] == ["Anna Berg", "She plays the harp."]
    assert (case["retrieved"], case["gold"]) == ([[0, 1], [1, 1]], [[1, 1]]) and case["answers"] == ["Anna", "Anna B."]
    assert not list(unnamed.of_musique([record | {"answerable": False}]))
    record["paragraphs"][1]["paragraph_text"] = "Anna plays the harp."
    assert not list(unnamed.of_musique([record]))


def test_tables_of_a_study_that_is_not_done(tmp_path, capsys):
    folder = tmp_path / "hotpotqa-kl"
    folder.mkdir()
    about = {"data": "d", "instruction": "i", "max_new_tokens": 0, "device": "cpu", "versions": {}}
    (folder / "settings.json").write_text(json.dumps(about))
    kl = {"full-prefill": 0.0, "relevant-tokens:ratio=0.1@document": 0.2, "question-aware:ratio=0.1@document": 0.1}
    kl["question-aware:ratio=0.1@alone"] = 0.05
    rows = [
        {"case": case, "arm": arm, "kl_chunks": value * (1 + int(case)), "top1_chunks": 1.0, "budget": 0.1}
        for case in ("0", "1", "2")
        for arm, value in kl.items()
    ]
    rows.append({"case": "3", "arm": "full-prefill", "kl_chunks": 0.0, "top1_chunks": 1.0, "budget": 0.1})
    rows += [{"case": case, "arm": "oracle:ratio=0.1@document", "refused": "no\u2028page"} for case in ("0", "1", "2")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines[-1] = lines[-1][:20]  # it is just being written
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "study.json").write_text('{"xquad-kl": "as it was", "hotpotqa-kl": "before"}')
    study.main(["--tables", "--out", str(tmp_path), "--json", str(tmp_path / "study.json")])
    shown = capsys.readouterr().out
    assert "hotpotqa-kl, 4 cases" in shown and "oracle" not in shown
    row = "| `question-aware:ratio=0.1@document` | 3 | 10.0% | 0.200 (0.100 to 0.300) | -0.200 (-0.300 to -0.100) |"
    assert row in shown and "| `full-prefill` | 4 |" in shown
    written = json.loads((tmp_path / "study.json").read_text())
    assert written["xquad-kl"] == "as it was"
    both = written["hotpotqa-kl"]["arms"]["question-aware:ratio=0.1@document"]
    assert both["kl_chunks less alone"] == pytest.approx([0.1, 0.05, 0.15, 3])
    assert written["hotpotqa-kl"]["arms"]["full-prefill"]["kl_chunks less default"][:] == pytest.approx(
        [-0.4, -0.6, -0.2, 3]
    )


def test_intervals_of_a_study_draw_documents(tmp_path):
    (tmp_path / "settings.json").write_text(
        json.dumps({"data": "d", "instruction": "i", "max_new_tokens": 0, "device": "cpu", "versions": {}})
    )
    rows = [{"case": str(n), "arm": "full-prefill", "f1": float(n < 10), "budget": 1.0} for n in range(20)]
    lines = [json.dumps(row | {"document": str(int(row["case"]) // 10)}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    assert tuple(study.summed(tmp_path)["arms"]["full-prefill"]["f1"]) == (0.5, 0, 1, 20)


def test_sets_of_two_contexts_and_studies_of_several_models_are_summed_up_together(tmp_path, capsys):
    """A question that two runs asked is two cases, about one document."""
    kept = "relevant-tokens:ratio=0.1,keep_document=true@document"
    scores = {"full-prefill": 1.0, kept: 0.5, "relevant-tokens:ratio=0.1@alone": 0.75}
    for model, name in (("small", "xquad-answers"), ("small", "unnamed-answers"), ("large", "xquad-answers")):
        folder = tmp_path / model / name
        folder.mkdir(parents=True)
        about = {"data": name[:5], "instruction": "i", "max_new_tokens": 24, "device": "cpu", "versions": {}}
        (folder / "settings.json").write_text(json.dumps(about))
        lines = [
            json.dumps({"case": case, "document": case, "arm": arm, "f1": score * (1 + int(case)), "budget": 0.1})
            for case in ("0", "1")
            for arm, score in scores.items()
        ]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    out = [str(tmp_path / "small"), str(tmp_path / "large")]
    study.main(["--tables", "--out", *out, "--json", str(tmp_path / "study.json")])
    assert "both contexts-answers, 6 cases" in capsys.readouterr().out
    written = json.loads((tmp_path / "study.json").read_text())
    assert written.keys() == {"xquad-answers", "unnamed-answers", "both contexts-answers"}
    together = written["both contexts-answers"]
    assert (written["xquad-answers"]["cases"], together["about"]["data"]) == (4, "xquad, unnam")
    figures = together["arms"][kept]
    assert figures["f1"] == pytest.approx([0.75, 0.5, 1.0, 6])
    assert figures["f1 less alone"] == pytest.approx([-0.375, -0.5, -0.25, 6])
    with pytest.raises(SystemExit):
        study.main(["--model", "m", "--data", str(tmp_path), "--out", *out])


def test_where_there_are_two_contexts_what_documents_told_is_kept_once(tmp_path, monkeypatch):
    for name in ("xquad.en.json", "hotpotqa_dev_120.jsonl"):
        (tmp_path / name).write_text("")
    asked = []
    monkeypatch.setattr(study.subprocess, "run", lambda command, check: asked.append(command))
    study.main(["--model", "m", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    kept = "relevant-tokens:ratio=0.1,keep_document=true@document"
    assert {(str(tmp_path / "xquad.en.json") in command, command.count(kept)) for command in asked} == {
        (True, 1),
        (False, 0),
    }


def test_sets_that_are_there_are_asked_in_order(tmp_path):
    for name in ("xquad.en.json", "hotpotqa_dev_120.jsonl", "other.json"):
        (tmp_path / name).write_text("")
    assert [name for name, _ in study.found(tmp_path, [])] == ["hotpotqa", "xquad"]
    assert [name for name, _ in study.found(tmp_path, ["xquad"])] == ["xquad"]


def test_choices_of_all_tokens_are_the_full_prefill(monkeypatch):
    """And of half of them are not: what is told apart is what was computed."""
    documents = (("Anna lives in the north.",), ("She plays the harp.",), ("Oslo lies on a river.",))
    case = Case("a", "all", "What does Anna play?", ("harp",), documents, everything(documents), ((1, 0),))
    tokenizer = bundled.load()[1]
    bench = Bench(tiny_model(vocab_size=1792), tokenizer, PromptTemplate(**bundled.TEMPLATE), max_new_tokens=0)
    monkeypatch.setattr(ceiling, "RATIOS", (0.5, 1.0))
    found = ceiling.asked(bench, case)
    for arm in ("default", "looking twice", "knowing"):
        assert found[f"{arm} 1.0"] < 1e-9 < found[f"{arm} 0.5"] < found["reuse"]
    figures = ceiling.summed({"a": found, "b": {name: 2 * value for name, value in found.items()}})
    less = found["default 0.5"] - found["knowing 0.5"]
    assert figures["default 0.5"]["more than knowing"][0] == pytest.approx(1.5 * less)
    assert "more than knowing" not in figures["reuse"]
