"""Data sets, recognised by what is in the file, as cases. One function a form."""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragkv.errors import whole_number
from ragkv.evaluation import longbench
from ragkv.evaluation.cases import Case, Place, everything, spread
from ragkv.evaluation.errors import EvaluationError
from ragkv.evaluation.metrics import language_of
from ragkv.evaluation.retrieving import retrieve

Record = dict[str, Any]
_DOCUMENT = re.compile(r"^Document \d+:\n?", re.MULTILINE)
_TOP_K = 5  # passages, where the data does not say which were retrieved
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Form:
    """A form of data.

    Attributes:
        name: what people call it.
        fields: what a record of this form has.
        parse: what a record says: the fields of a :class:`Case`, or of ``documents`` some as texts that are not cut yet, and as
            ``supporting`` the numbers of those that the answer rests on; ``lines``: they are cut between lines only.
        questions: a record with several questions as several records, for ``parse``.
        brief: whether its answers are a few words.
        pooled: whether all documents of the file are what a question is asked about, so that passages have to be retrieved.
    """

    name: str
    fields: tuple[str, ...]
    parse: Callable[[Record], dict[str, Any]]
    questions: Callable[[Record], Iterable[Record]] = lambda record: [record]
    brief: bool = True
    pooled: bool = False


#: Asks for the shortest answer, by language; LongBench's words (arXiv:2308.14508).
_BRIEF = {
    "en": "Only give me the answer and do not output any other words.",
    "de": "Gib mir nur die Antwort und keine anderen Wörter aus.",
    "zh": "只给我答案，不要输出任何其他字词。",  # noqa: RUF001 (Chinese punctuation)
}


def brief(name: str, cases: Sequence[Case]) -> str:
    """What asks for the shortest answer in the language of the data; empty where answers are not a few words.

    Args:
        name: of the form.
        cases: of the data.
    """
    known, data_set = {form.name: form.brief for form in FORMS}[name], longbench.data_set(cases[0].kind)
    return _BRIEF[cases[0].language] if known and (data_set is None or data_set.brief) else ""


def read_cases(
    path: str | Path, chunk_words: int = 512, top_k: int | None = None, limit: int | None = None
) -> tuple[str, list[Case]]:
    """Read a file of one of :data:`FORMS`, JSON or JSON lines.

    Args:
        path: the file; packed with bzip2 where its name ends in ``.bz2``.
        chunk_words: longer passages are cut into chunks of at most so many words; not those of the native form.
        top_k: passages that are retrieved for a question (:func:`ragkv.evaluation.retrieving.retrieve`); what the data says by
            default, and 5 where it says nothing (SQuAD).
        limit: passages are retrieved for so many questions that have an answer, and what stands behind them is left out.

    Returns:
        The form's name, and the cases, so ordered that the first few stand for all (:func:`ragkv.evaluation.cases.spread`).

    Raises:
        ArgumentError, ArgumentTypeError: a number is below 1, or no whole one.
        EvaluationError: the file is of no known form, or a record is not of the first one's form.
        MissingPackageError: passages are to be retrieved, and the offline embedder is not installed.
    """
    whole_number("chunk_words", chunk_words, 1)
    for name, number in (("top_k", top_k), ("limit", limit)):
        if number is not None:
            whole_number(name, number, 1)
    path = Path(path)
    data = path.read_bytes()
    try:
        text = (bz2.decompress(data) if path.suffix == ".bz2" else data).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} is not text in UTF-8, or not whole: {error}") from error
    records = _records(text)
    form = next((form for form in FORMS if records and _fits(records[0], form)), None)
    if form is None:
        lines = text.strip().splitlines()
        known = "; ".join(f"{form.name} ({', '.join(form.fields)})" for form in FORMS)
        first = f"it begins with {lines[0][:160]!r}" if lines else "it is empty"
        raise EvaluationError(
            f"{path} is of no known form; {first}. Expected JSON or JSON lines whose records have the fields of one of: {known}"
        )
    cases: list[Case] = []
    for number, record in enumerate(records):
        if not _fits(record, form):
            raise EvaluationError(f"{path}: record {number + 1} is not of the form {form.name}: {str(record)[:160]!r}")
        try:
            for asked in form.questions(record):
                cases.append(_case(len(cases), chunk_words, **form.parse(asked)))
        except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise EvaluationError(f"{path}: record {number + 1} is not a good {form.name} record: {error!r}") from error
    if not cases:
        raise EvaluationError(f"{path} holds no question")
    cases = spread(cases)
    if top_k is None and not form.pooled:
        return form.name, cases
    return form.name, list(_first(limit, retrieve(cases, top_k or _TOP_K, pooled=form.pooled)))


def _first(count: int | None, cases: Iterable[Case]) -> Iterator[Case]:
    """Cases up to so many that have an answer."""
    for case in cases:
        yield case
        if count is not None and any(case.answers):
            count -= 1
            if not count:
                return


def _records(text: str) -> list[Any]:
    """A JSON list, a JSON object that holds one, or JSON lines; empty where it is none of these."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        try:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError:
            return []
    if isinstance(whole, dict):
        return whole["data"] if isinstance(whole.get("data"), list) else [whole]
    return whole if isinstance(whole, list) else []


def _fits(record: Any, form: Form) -> bool:
    return isinstance(record, dict) and all(field in record for field in form.fields)


def text_of(value: Any) -> str:
    """A text, or a number as one; blank where there is none.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise TypeError(f"{value!r:.80} stands where a text must")
    return "" if value is None else str(value)


def texts_of(value: Any) -> tuple[str, ...]:
    """One answer, several, or several lists of them; blank ones, which an empty reply would match, are none.

    Raises:
        TypeError: one is neither text nor number.
    """
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in texts_of(item))
    return tuple(filter(str.strip, [text_of(value)]))


def cut(text: str, words: int) -> tuple[str, ...]:
    """A text as chunks of at most ``words`` words, cut at ends of sentences where that can be."""
    chunks: list[str] = []
    held: list[str] = []
    for sentence in _SENTENCE_END.split(text.strip()):
        pieces = sentence.split()
        if len(held) + len(pieces) > words and held:
            chunks.append(" ".join(held))
            held = []
        held += pieces
        while len(held) > words:
            chunks.append(" ".join(held[:words]))
            held = held[words:]
    return (*chunks, " ".join(held)) if held or not chunks else tuple(chunks)


def cut_lines(text: str, words: int) -> tuple[str, ...]:
    """A text as chunks of at most ``words`` words, cut between lines, which stay as they are; only a longer line is cut itself."""
    chunks: list[str] = []
    held: list[str] = []
    left = words
    for line in text.strip("\n").split("\n"):
        count = len(line.split())
        if held and count > left:
            chunks.append("\n".join(held))
            held, left = [], words
        if count > words:
            chunks += cut(line, words)
        else:
            held.append(line)
            left -= count
    return tuple(chunk for chunk in (*chunks, "\n".join(held)) if chunk.strip()) or ("",)


def _titled(title: Any, text: Any) -> str:
    return "\n".join(filter(None, (text_of(title).strip(), text_of(text))))


def _case(
    number: int,
    words: int,
    documents: Iterable[Any],
    retrieved: Iterable[Place] | None = None,
    gold: Iterable[Place] = (),
    supporting: Collection[int] = (),
    lines: bool = False,
    **rest: Any,
) -> Case:
    parts = cut_lines if lines else _chunks
    documents = tuple(parts(text, words) if isinstance(text, str) else tuple(text) for text in documents)
    places = everything(documents)
    return Case(
        id=text_of(rest.pop("id")) or str(number),
        question=text_of(rest.pop("question")),
        answers=texts_of(rest.pop("answers")),
        documents=documents,
        retrieved=places if retrieved is None else tuple((int(d), int(c)) for d, c in retrieved),
        gold=(*((int(d), int(c)) for d, c in gold), *(place for place in places if place[0] in supporting)),
        **rest,
    )


def _chunks(text: str, words: int) -> tuple[str, ...]:
    text = text.strip()
    return (text,) if len(text.split()) <= words else cut(text, words)


def _cacheblend(record: Record) -> dict[str, Any]:
    return {
        "documents": [_titled(passage.get("title"), passage["text"]) for passage in record["ctxs"]],
        "id": record.get("id"),
        "kind": "cacheblend",
        "question": record["question"],
        "answers": record["answers"],
    }


def _hotpot(record: Record) -> dict[str, Any]:
    """HotpotQA and 2WikiMultihopQA: as first published, or with columns as in the Parquet files."""
    context, facts = record["context"], record.get("supporting_facts") or []
    if isinstance(context, dict):
        context = list(zip(context["title"], context.get("sentences") or context["content"], strict=True))
    supporting = facts["title"] if isinstance(facts, dict) else [title for title, _ in facts]
    return {
        "documents": [_titled(title, _joined(text)) for title, text in context],
        "supporting": [index for index, (title, _) in enumerate(context) if title in supporting],
        "id": text_of(record.get("_id")) or record.get("id"),
        "kind": str(record.get("type") or "multi-hop"),
        "question": record["question"],
        "answers": record["answer"],
    }


def _joined(text: str | list[str]) -> str:
    """A paragraph: of sentences, or as it is."""
    return text if isinstance(text, str) else " ".join(sentence.strip() for sentence in text)


def _musique(record: Record) -> dict[str, Any]:
    passages = record["paragraphs"]
    return {
        "documents": [_titled(passage.get("title"), passage["paragraph_text"]) for passage in passages],
        "supporting": [index for index, passage in enumerate(passages) if passage.get("is_supporting")],
        "id": record.get("id"),
        "kind": (text_of(record.get("id")) or "musique").split("__")[0],
        "question": record["question"],
        "answers": [record["answer"], record.get("answer_aliases")] if record.get("answerable", True) else [],
    }


def _ruler(record: Record) -> dict[str, Any]:
    """RULER writes context and question into one text: the question is its last paragraph."""
    context, _, question = str(record["input"]).rstrip().rpartition("\n")
    opening, *listed = [piece for piece in _DOCUMENT.split(context) if piece.strip()]
    return {
        "documents": listed or [opening],  # what stands before the first of listed documents is the task's instruction
        "id": record.get("index"),
        "kind": str(record.get("task") or "ruler"),
        "question": question.strip(),
        "answers": record["outputs"],
    }


def _native(record: Record) -> dict[str, Any]:
    return {
        "documents": _documents(record["documents"]),
        "retrieved": record.get("retrieved"),
        "gold": record.get("gold") or (),
        "id": record.get("id"),
        "kind": text_of(record.get("kind")) or "all",
        "question": record["question"],
        "answers": record["answers"],
        "ordered": bool(record.get("ordered")),
        "language": text_of(record.get("language")) or "en",
    }


def _documents(listed: Any) -> list[tuple[str, ...]]:
    """Documents as lists of chunks; a text is one of a single chunk."""
    if not isinstance(listed, list):
        raise TypeError(f"documents must be a list, got {listed!r:.80}")
    return [tuple(map(text_of, chunks if isinstance(chunks, list) else [chunks])) for chunks in listed]


def _asked(article: Record) -> list[Record]:
    """SQuAD has a record for an article, with its questions at their paragraphs."""
    return [
        {**article, **asked, "at": at}
        for at, paragraph in enumerate(article["paragraphs"])
        for asked in paragraph["qas"]
    ]


def _squad(record: Record) -> dict[str, Any]:
    first, *rest = [paragraph["context"] for paragraph in record["paragraphs"]]
    chunks = [_titled(str(record.get("title") or "").replace("_", " "), first), *rest]
    return {
        "documents": [chunks],
        "gold": [(0, record["at"])],
        "id": record.get("id"),
        "kind": "squad",
        "question": record["question"],
        "answers": [] if record.get("is_impossible") else list(dict.fromkeys(a["text"] for a in record["answers"])),
        "language": language_of(" ".join(chunks)),
    }


FORMS = (
    Form("ragkv", ("question", "answers", "documents"), _native, brief=False),
    Form("CacheBlend", ("ctxs", "question", "answers"), _cacheblend),
    Form("LongBench", ("input", "context", "answers"), longbench.parse),
    Form("MuSiQue", ("paragraphs", "question", "answer"), _musique),
    Form("HotpotQA or 2WikiMultihopQA", ("context", "question", "answer"), _hotpot),
    Form("RULER", ("input", "outputs"), _ruler, brief=False),
    Form("SQuAD", ("paragraphs",), _squad, _asked, pooled=True),
)
"""Every form that is read; a record fits the first one whose fields it has."""
