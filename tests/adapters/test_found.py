"""Passages found again in a user's message: only where taking them out leaves the message what it was."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest

from ragkv import Engine
from ragkv.adapters.found import FoundPassages
from ragkv.adapters.passages import Passage
from ragkv.testing import tiny_model

A, B, LONG = "The mill stands.", "Mira runs it.", "The mill stands.\nIt is old."
QUESTION = "Who runs it?"


@pytest.fixture
def found():
    found = FoundPassages()
    found.leave(map(Passage, (A, B, LONG)))
    return found


def split(found, text):
    passages, rest = found.split(text)
    return [passage.text for passage in passages], rest


@pytest.mark.parametrize(
    ("message", "passages", "rest"),
    [
        (f"{A}\n\n{B}\n\n{QUESTION}", [A, B], QUESTION),
        (f"{B}\n{A}\n{QUESTION}", [B, A], QUESTION),
        (
            f"Answer briefly.\n\nContext:\n{A}\n\nQuestion: {QUESTION}",
            [A],
            f"Answer briefly.\n\nContext:\n\nQuestion: {QUESTION}",
        ),
        (f"{A}\n\n{A}\n\n{QUESTION}", [A, A], QUESTION),
        (f"{LONG}\n\n{QUESTION}", [LONG], QUESTION),
    ],
    ids=["joined", "lines", "instruction", "twice", "the longest"],
)
def test_in_front_of_a_question(found, message, passages, rest):
    assert split(found, message) == (passages, rest)


@pytest.mark.parametrize(
    "message",
    [
        f"{QUESTION}\n\n{A}",
        A,
        f"Why '{A}'? {QUESTION}",
        f"Why {A}\n{QUESTION}",
        f"{A} Indeed.\n{QUESTION}",
        f"From a.md:\n{A}\n\nFrom b.md:\n{B}\n\n{QUESTION}",
        f"{A}x\n\n{QUESTION}",
        "Something else entirely.",
        "",
    ],
    ids=["behind", "alone", "quoted", "end of line", "start of line", "labels between", "longer", "none", "empty"],
)
def test_anywhere_else_it_is_text(found, message):
    assert split(found, message) == ([], message)


def test_the_oldest_are_forgotten(found):
    found.leave([Passage(A)])
    found.leave(Passage(f"Passage {number}.") for number in range(1023))
    assert split(found, f"{A}\n\n{QUESTION}")[0] == [A] and split(found, f"{B}\n\n{QUESTION}")[0] == []
    found.leave([Passage("One more.")])
    assert split(found, f"{A}\n\n{QUESTION}")[0] == []


def test_the_last_reference_counts(found):
    found.leave([Passage(A, reference="other")])
    assert found.split(f"{A}\n{QUESTION}")[0][0].reference == "other"


def test_a_fork_beside_somebody_who_leaves_some(found, forked):
    with ThreadPoolExecutor(1) as thread:
        thread.submit(FoundPassages._lock.held.acquire).result()
        try:
            assert forked(lambda: split(found, f"{A}\n\n{QUESTION}")[0], timeout_s=20) == str([A])
        finally:
            thread.submit(FoundPassages._lock.held.release).result()


def test_each_engine_has_its_own():
    one, two = Engine(tiny_model()), Engine(tiny_model())
    FoundPassages.of(one).leave([Passage(A)])
    assert split(FoundPassages.of(one), f"{A}\n{QUESTION}")[0] == [A]
    assert split(FoundPassages.of(two), f"{A}\n{QUESTION}")[0] == []
    before = len(FoundPassages._of)
    del one
    gc.collect()
    assert len(FoundPassages._of) == before - 1
