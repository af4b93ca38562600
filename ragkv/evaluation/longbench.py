"""LongBench (Bai et al., arXiv:2308.14508): how its data sets are asked, and by which of its scores each is counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ragkv.evaluation.metrics import edit_similarity, f1, rouge_l

_PASSAGE = re.compile(r"^Passage \d+:\n", re.MULTILINE)
#: In front of paragraphs that are asked for by their number, which therefore stays with them.
_PARAGRAPH = re.compile(r"^(?=Paragraph \d+:|段落\d+[:\uff1a])", re.MULTILINE)
#: So many last lines of code that is to be gone on with stand in the question, right before the answer.
_LAST_LINES = 10
_NUMBER = re.compile(r"\d+")
#: What marks a line that is no code.
_NO_CODE = ("`", "#", "//")


def numbers(answer: str, gold: str) -> float:
    """The share of the numbers in an answer that are the one in the gold answer: counting and retrieval score."""
    said, right = _NUMBER.findall(answer), _NUMBER.findall(gold)[:1]
    return said.count(right[0]) / len(said) if said and right else 0.0


def classification(answer: str, gold: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that an answer names, if the right one is among them; those that are a part of its name are
    not counted.
    """
    named = [name for name in classes if name in answer and (name == gold or name not in gold)]
    return 1 / len(named) if gold in named else 0.0


def code_similarity(answer: str, gold: str) -> float:
    """Edit similarity of the first line of an answer that is neither a comment nor a fence."""
    lines = answer.lstrip("\n").split("\n")
    return edit_similarity(next((line for line in lines if not any(mark in line for mark in _NO_CODE)), ""), gold)


@dataclass(frozen=True)
class DataSet:
    """How one data set is asked and scored.

    Attributes:
        scored: by which score: ``"f1"``, ``"rouge_l"``, ``"numbers"``, ``"class"`` or ``"code"``.
        words: the question, with ``{input}`` for what the record asks; where a record asks nothing they are all of it.
        brief: answers are a few words, and shall be.
        parts: what parts the passages of a context; ``None`` where there are none: code and examples, cut between lines only.
        ordered: the answer hangs on the order of the chunks.
        first_line: only the first line of an answer counts.
    """

    scored: str
    words: str = "{input}"
    brief: bool = False
    parts: re.Pattern[str] | None = _PASSAGE
    ordered: bool = False
    first_line: bool = False

    def question(self, asked: str) -> str:
        """What is asked of a record."""
        return self.words.replace("{input}", asked) if "{input}" in self.words or not asked.strip() else asked


_QUESTIONS = DataSet("f1", brief=True)
_NEXT_LINE = "Write the next line of this code, and nothing else.\n\n{input}"
_HOW_MANY = "How many paragraphs are there, if those that are there twice count once? Say the number alone."
_WHICH = "Of which paragraph is this a summary?\n\n{input}\n\nSay its number alone, as in: Paragraph 1"
_WHICH_ZH = "下面的摘要出自哪一段？\n\n{input}\n\n只说编号，例如：段落1"  # noqa: RUF001 (Chinese punctuation)
_TYPE = "Say of which type this question is, as the examples do.\n\n{input}"
_TYPE_ZH = "请像例子那样说出这条新闻的类别。\n\n{input}"
_PLAIN = ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique")

DATA_SETS: dict[str, DataSet] = {
    **dict.fromkeys(_PLAIN, _QUESTIONS),
    "triviaqa": DataSet("f1", brief=True, parts=None, first_line=True),
    "dureader": DataSet("rouge_l"),
    "qmsum": DataSet("rouge_l"),
    "gov_report": DataSet("rouge_l", "Write a summary of the report, one page long."),
    "multi_news": DataSet("rouge_l", "Write a summary of all the news, one page long."),
    "vcsum": DataSet("rouge_l", "请总结会议的内容。"),
    "samsum": DataSet("rouge_l", parts=None, first_line=True),
    "trec": DataSet("class", _TYPE, parts=None, first_line=True),
    "lsht": DataSet("class", _TYPE_ZH, parts=None, first_line=True),
    "passage_count": DataSet("numbers", _HOW_MANY, parts=_PARAGRAPH),
    "passage_retrieval_en": DataSet("numbers", _WHICH, parts=_PARAGRAPH),
    "passage_retrieval_zh": DataSet("numbers", _WHICH_ZH, parts=_PARAGRAPH),
    "lcc": DataSet("code", _NEXT_LINE, parts=None, ordered=True),
    "repobench-p": DataSet("code", _NEXT_LINE, parts=None, ordered=True),
}
"""The data sets of LongBench by name; those of LongBench-E are called the same, some with ``_e`` behind it."""


def data_set(name: str) -> DataSet | None:
    """The one of a name, if there is one."""
    return DATA_SETS.get(name.removesuffix("_e"))


def score(
    name: str, answer: str, gold: Sequence[str], language: str = "en", classes: Sequence[str] = ()
) -> float | None:
    """What LongBench gives an answer.

    Args:
        name: of the data set.
        answer: as it was decoded, with its line ends.
        gold: the right answers; the best counts.
        language: as of a :class:`~ragkv.evaluation.Case`.
        classes: among which a record of trec and lsht chooses.

    Returns:
        From 0 to 1; ``None`` where the data set is none of LongBench's, or has no classes though it should.
    """
    known = data_set(name)
    if known is None or (known.scored == "class" and not classes):
        return None
    if known.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    against: dict[str, Callable[[str], float]] = {
        "f1": lambda right: f1(answer, [right], language),
        "rouge_l": lambda right: rouge_l(answer, [right], language),
        "numbers": lambda right: numbers(answer, right),
        "class": lambda right: classification(answer, right, classes),
        "code": lambda right: code_similarity(answer, right),
    }
    return max(map(against[known.scored], gold))


def parse(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a :class:`~ragkv.evaluation.Case`, as forms of data give them."""
    name = str(record.get("dataset") or "longbench")
    known, context, asked = data_set(name) or _QUESTIONS, record["context"], str(record["input"] or "")
    if known.ordered and not asked.strip():  # the code to go on with is the end of the context
        lines = context.strip("\n").split("\n")
        cut = max(len(lines) // 2, len(lines) - _LAST_LINES)
        context, asked = "\n".join(lines[:cut]), "\n".join(lines[cut:])
    pieces = [context] if known.parts is None else known.parts.split(context)
    return {
        "documents": [piece for piece in pieces if piece.strip()],
        "id": record.get("_id"),
        "kind": name,
        "question": known.question(asked),
        "answers": record["answers"],
        "language": "en" if known.ordered else str(record.get("language") or "en"),  # of code it is python or the like
        "classes": tuple(map(str, record.get("all_classes") or ())),
        "lines": known.parts is None,
        "ordered": known.ordered,
    }
