"""Documents are read as documents: what the bundled model shows on held-out names (docs/design.md).

A fact of a later chunk that says "she" or "the company" is asked for, with nothing recomputed. Read in its document, the chunk
knows of whom it speaks: in any order, and when the naming chunk was not retrieved, where a full prefill of the same chunks fails.
"""

import pytest

from ragkv import Engine, FullPrefill, PromptTemplate, Reuse, bundled
from ragkv.evaluation import read_cases

CASES, DOCUMENTS = 16, 3


@pytest.fixture(scope="module")
def engine():
    return Engine(*bundled.load(), template=PromptTemplate(**bundled.TEMPLATE))


@pytest.fixture(scope="module")
def cross():
    """Cases whose fact stands in a later chunk that does not name its subject."""
    found = [case for case in read_cases(bundled.CASES_PATH)[1] if case.kind == "cross"]
    return [case for case in found if case.gold[0][0] < DOCUMENTS][:CASES]


def read(engine, case, whole):
    read_one = engine.add_document if whole else engine.add
    return [chunk for texts in case.documents[:DOCUMENTS] for chunk in read_one(texts)]


def subject(case):
    """The name that the question asks about, as the documents write it: its first word tells the naming chunks."""
    words = [word.strip("?.,'s") for word in case.question.split()[1:]]
    names = [word for word in words if word[:1].isupper() and any(word in text for text in sum(case.documents, ()))]
    return names[0] if names else None


def share_right(engine, cases, pick, method, whole=True):
    right = []
    for case in cases:
        chunks = pick(case, read(engine, case, whole))
        answer = engine.generate(chunks, case.question, method=method, max_new_tokens=10).text.strip()
        right.append(answer == case.answers[0])
    return sum(right) / len(right)


def in_order(case, chunks):
    return chunks


def reversed_order(case, chunks):
    return chunks[::-1]


def without_naming_chunks(case, chunks):
    name = subject(case)
    return [chunk for chunk in chunks if name not in chunk.text]


def test_facts_bound_in_an_earlier_chunk(engine, cross):
    shares = {
        "alone": share_right(engine, cross, in_order, Reuse(), whole=False),
        "in its document": share_right(engine, cross, in_order, Reuse()),
        "in its document, reversed": share_right(engine, cross, reversed_order, Reuse()),
        "full prefill": share_right(engine, cross, in_order, FullPrefill()),
        "in its document, naming chunk absent": share_right(engine, cross, without_naming_chunks, Reuse()),
        "full prefill, naming chunk absent": share_right(engine, cross, without_naming_chunks, FullPrefill()),
    }
    print(shares)
    assert shares["in its document"] >= shares["full prefill"] - 0.1
    assert shares["in its document, reversed"] >= shares["full prefill"] - 0.2
    assert shares["in its document"] >= shares["alone"] + 0.3
    assert shares["in its document, naming chunk absent"] >= shares["full prefill, naming chunk absent"] + 0.3
