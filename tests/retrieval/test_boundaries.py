# ruff: noqa: RUF001 - full stops of other scripts are meant

import time
from itertools import pairwise

import pytest

from ragkv.retrieval.boundaries import Rank, boundaries


def parts(text):
    stops = [0, *(mark.position for mark in boundaries(text)), len(text)]
    return [text[a:b].strip() for a, b in pairwise(stops)]


def ranks(text):
    return [mark.rank for mark in boundaries(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One is here. Two is there! Is it? Yes.", ["One is here.", "Two is there!", "Is it?", "Yes."]),
        ("She met Dr. Smith, e.g. at 5 p.m. on Fig. 3. Then she left.", None),
        ("It was written by J. R. R. Tolkien. He was old.", ["It was written by J. R. R. Tolkien.", "He was old."]),
        ('"Why?" he said. "So." Then he went.', ['"Why?" he said.', '"So."', "Then he went."]),
        ("all of it in small letters. even this. etc. and that", None),
        ("It cost 3.50 or so... and more. Done.", ["It cost 3.50 or so... and more.", "Done."]),
        ("他来了。她走了！真的吗？", ["他来了。", "她走了！", "真的吗？"]),
        ("Line one goes on\nin line two. Line three.", ["Line one goes on\nin line two.", "Line three."]),
        ("", [""]),
        (" \n\n ", [""]),
    ],
    ids=[
        "marks",
        "abbreviations",
        "initials",
        "quotes",
        "lower case",
        "numbers",
        "ideographs",
        "wrapped",
        "empty",
        "blank",
    ],
)
def test_sentences_are_found(text, expected):
    expected = (
        expected
        or {
            "She": ["She met Dr. Smith, e.g. at 5 p.m. on Fig. 3.", "Then she left."],
            "all": ["all of it in small letters.", "even this.", "etc. and that"],
        }[text[:3]]
    )
    assert parts(text) == expected


def test_structure_has_its_ranks():
    text = "Intro.\n\n# Head\n\nText one. Text two.\n\nNext.\n- item\n- item\n## Head\nMore."
    assert list(zip(parts(text), [Rank.HEADING, *ranks(text)], strict=True)) == [
        ("Intro.", Rank.HEADING),
        ("# Head", Rank.HEADING),
        ("Text one.", Rank.LINE),  # a heading keeps what follows it
        ("Text two.", Rank.SENTENCE),
        ("Next.", Rank.PARAGRAPH),
        ("- item", Rank.SENTENCE),
        ("- item", Rank.SENTENCE),
        ("## Head", Rank.HEADING),
        ("More.", Rank.LINE),
    ]


def test_a_fenced_block_is_cut_between_lines_only():
    text = "Code.\n\n~~~\n# no heading\n\n```\nx = 1.  Y\n~~~\nAfter it. End."
    assert list(zip(parts(text), [Rank.HEADING, *ranks(text)], strict=True)) == [
        ("Code.", Rank.HEADING),
        ("~~~", Rank.PARAGRAPH),
        ("# no heading", Rank.LINE),
        ("```", Rank.LINE),
        ("x = 1.", Rank.LINE),
        ("Y", Rank.SENTENCE),
        ("~~~", Rank.LINE),
        ("After it.", Rank.PARAGRAPH),
        ("End.", Rank.SENTENCE),
    ]


@pytest.mark.parametrize(
    "text", ["." * 100_000, ". " * 50_000, "\n" * 100_000, "#" * 100_000, "`" * 100_000, '."' * 50_000]
)
def test_hostile_text_takes_linear_time(text):
    start = time.perf_counter()
    list(boundaries(text))
    assert time.perf_counter() - start < 5
