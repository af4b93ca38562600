"""Metrics against values worked out by hand, and statistics against what they must be."""

import math

import numpy as np
import pytest
import torch

from ragkv.evaluation import metrics
from ragkv.evaluation.statistics import Resampling, difference, pareto


@pytest.mark.parametrize(
    ("answer", "gold", "em", "f1", "rouge_l", "contained"),
    [
        ("The Harp.", ["harp"], 1, 1, 1, 1),
        ("a red harp", ["harp"], 0, 2 / 3, 2 / 3, 1),
        ("harp", ["violin", "the harp"], 1, 1, 1, 1),
        ("green red", ["red green"], 0, 1, 0.5, 0),
        ("sharp", ["harp"], 0, 0, 0, 0),
        ("", ["harp"], 0, 0, 0, 0),
        ("the", ["a"], 0, 0, 0, 0),
        ("", ["A"], 0, 0, 0, 0),
        ("A.", ["B", "A"], 1, 1, 1, 1),
        ("", ["?!"], 0, 0, 0, 0),
        ("one two three four", ["one three five"], 0, 4 / 7, 4 / 7, 0),
    ],
)
def test_answers(answer, gold, em, f1, rouge_l, contained):
    assert metrics.exact_match(answer, gold) == em
    assert metrics.f1(answer, gold) == pytest.approx(f1)
    assert metrics.rouge_l(answer, gold) == pytest.approx(rouge_l)
    assert metrics.contains(answer, gold) == contained


@pytest.mark.parametrize(
    ("language", "answer", "gold", "em", "f1"),
    [
        ("de", "Die „Harfe“!", "eine Harfe", 1, 1),
        ("de", "The harp", "harp", 0, 2 / 3),
        ("zh", "《红楼梦》。", "红楼梦", 1, 1),
        ("zh", "红楼", "红楼梦", 0, 0.8),
        ("zh", "NBA 总冠军", "nba总冠军", 1, 1),
        ("zh", "カタカナ。", "カタナ", 0, 6 / 7),
        ("en", "กรุง", "กรุงเทพ", 0, 8 / 11),
        ("en", "မန္တ", "မန္တလေး", 0, 8 / 11),
        ("en", "ភ្នំ", "ភ្នំពេញ", 0, 8 / 11),
    ],
)
def test_answers_of_other_languages(language, answer, gold, em, f1):
    """By hand; every character of Chinese is a word (MLQA, arXiv:1910.07475)."""
    assert metrics.exact_match(answer, [gold], language) == em
    assert metrics.f1(answer, [gold], language) == pytest.approx(f1)
    assert metrics.contains(answer, [gold], language) == float(em or language == "de")


def test_divergence():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    want = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert metrics.divergence(p.log(), q.log()) == pytest.approx(want, abs=1e-7)
    assert metrics.divergence(p.log() + 7, p.log()) == pytest.approx(0, abs=1e-7)  # logits are known up to a constant
    masked = torch.tensor([[0.0, -math.inf]])
    assert metrics.divergence(masked, torch.zeros(1, 2)) == pytest.approx(math.log(2))


def test_same_top():
    assert metrics.same_top(torch.tensor([[1.0, 3, 2]]), torch.tensor([[0.0, 9, 2]])) == 1
    assert metrics.same_top(torch.tensor([[1.0, 3, 2]]), torch.tensor([[0.0, 1, 2]])) == 0


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    cases, hits = [str(number) for number in range(60)], 0
    for seed in range(100):
        drawn = np.random.default_rng(seed).random(60) < 0.7
        found = Resampling(cases, seed).estimate({case: [float(v)] for case, v in zip(cases, drawn, strict=True)})
        hits += found.low <= 0.7 <= found.high
    assert 87 <= hits <= 100


def test_rows_of_one_case_are_no_independent_cases():
    cases = [str(number) for number in range(40)]
    rng = np.random.default_rng(0)
    values = {case: [float(rng.random() < 0.5)] for case in cases}
    one = Resampling(cases, 1).estimate(values)
    three = Resampling(cases, 1).estimate({case: rows * 3 for case, rows in values.items()})
    assert three == pytest.approx(one)
    assert three.n == 40


def test_cases_of_one_document_are_no_independent_cases():
    documents = {str(number): f"document {number // 10}" for number in range(200)}
    rng = np.random.default_rng(0)
    right = {document: [float(rng.random() < 0.5)] for document in documents.values()}
    of_documents = Resampling(list(right), 1).estimate(right)
    of_cases = Resampling(list(documents), 1, documents).estimate(
        {case: right[about] for case, about in documents.items()}
    )
    assert of_cases[:3] == pytest.approx(of_documents[:3])
    assert of_cases.n == 200


def test_where_all_are_of_one_document_cases_are_drawn():
    """Of one document drawn again and again nothing would seem uncertain."""
    cases = [str(number) for number in range(40)]
    documents = dict.fromkeys(cases[:20], "one") | {case: case for case in cases[20:]}
    values = {case: [float(number % 2)] for number, case in enumerate(cases[:20])}
    assert Resampling(cases, 1, documents).estimate(values) == Resampling(cases, 1).estimate(values)
    both = Resampling(cases, 1, documents).estimate({**values, "30": [1.0]})
    assert (both.low, both.high) == (0.5, 1.0), "the document is drawn, or the other, or both"


def test_differences_are_paired():
    cases = ["a", "b", "c"]
    arm, other = {"a": [1.0, 0.0], "b": [1.0], "c": [1.0]}, {"a": [1.0, 1.0], "b": [0.0], "d": [1.0]}
    assert difference(arm, other) == {"a": [0.0, -1.0], "b": [1.0]}
    found = Resampling(cases, 0).estimate(difference(arm, arm))
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert Resampling(cases, 0).estimate({}) is None


def test_the_same_seed_gives_the_same_interval():
    cases = [str(number) for number in range(10)]
    values = {case: [float(int(case) % 2)] for case in cases}
    first, again, other = (Resampling(cases, seed).estimate(values) for seed in (1, 1, 2))
    assert first == again
    assert first.mean == other.mean


def test_the_front_holds_what_nothing_beats():
    points = [(0.0, 0.5), (0.1, 0.9), (0.1, 0.8), (0.2, 0.7), (0.5, 0.95), (1.0, 0.95)]
    assert pareto(points) == [0, 1, 4]
    assert pareto([]) == []
