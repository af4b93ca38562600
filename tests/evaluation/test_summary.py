"""What rows add up to, on rows made by hand."""

import math

import pytest

from ragkv.evaluation.summary import summarise

CASES = [str(number) for number in range(20)]


def row(case, arm, order=0, **changes):
    fields = {"em": 0.0, "f1": 0.0, "gold_nll": 0.0, "budget": 0.1, "tokens": 10, "ttft_ms": 1.0}
    stages = {"place": 1.0, "select": 2.0, "compute": 3.0}
    return {"case": case, "kind": "k", "order": order, "arm": arm, "stages": stages, **fields, **changes}


def add_up(rows, timed=(), arms=("full-prefill", "full-documents", "a"), cases=CASES):
    found = summarise(rows, timed, arms, cases, seed=0)
    return found, {arm["name"]: arm for arm in found["arms"]}


def test_differences_are_drawn_together():
    """An arm that is right exactly where its yardstick is differs by nothing at all, however wide each one's own interval."""
    right = {case: float(int(case) % 2) for case in CASES}
    rows = [row(case, arm, em=right[case]) for case in CASES for arm in ("full-documents", "a")]
    rows += [row(case, "full-prefill", em=1.0) for case in CASES]
    _, arms = add_up(rows)
    low, high = arms["a"]["scores"]["all"]["em"][1:3]
    assert low < 0.35 and high > 0.65
    assert arms["a"]["against_documents"]["all"]["em"] == (0, 0, 0, 20)
    assert arms["full-prefill"]["against_documents"]["all"]["em"].mean == 0.5


def test_cases_of_one_document_are_drawn_together():
    rows = [row(case, "a", em=float(int(case) < 10), document=str(int(case) // 10)) for case in CASES]
    assert add_up(rows)[1]["a"]["scores"]["all"]["em"] == (0.5, 0, 1, 20)  # of two documents one is right


def test_perplexity_is_taken_of_the_mean():
    rows = [row(case, "a", gold_nll=math.log(2) if int(case) % 2 else math.log(8)) for case in CASES]
    assert add_up(rows)[1]["a"]["scores"]["all"]["perplexity"].mean == pytest.approx(4)


def test_slices():
    rows = [row("0", "a", order, kind="one", em=float(order > 0)) for order in range(3)]
    rows += [row("1", "a", kind="two", em=1.0)]
    found, arms = add_up(rows)
    assert found["slices"] == {"all": 2, "one": 1, "two": 1, "order as given": 1, "order shuffled": 1}
    means = {name: scores["em"].mean for name, scores in arms["a"]["scores"].items()}
    assert means == {"all": 0.75, "one": pytest.approx(2 / 3), "two": 1, "order as given": 0, "order shuffled": 1}
    assert (arms["a"]["n"], arms["a"]["prompts"]) == (2, 4)


def test_costs():
    times = [1.0, 2.0, 90.0]
    rows = [row(str(n), "a", ttft_ms=ms, budget=0.1 * n) for n, ms in enumerate(times)]
    timed = [{"a": {"cold_ms": 5.0, "bytes_read": 7, "peak_bytes": None}}, {"a": {"cold_ms": 9.0, "bytes_read": 9}}, {}]
    cost = add_up(rows, timed)[1]["a"]["cost"]
    assert (cost["ttft_ms"], cost["budget"], cost["timed"]) == (2, pytest.approx(0.1), 2)
    assert 2 < cost["ttft_p95_ms"] <= 90
    assert cost["stages_ms"] == {"place": 1, "select": 2, "compute": 3}
    assert (cost["cold_ms"], cost["bytes_read"]) == (7, 8) and "peak_bytes" not in cost


def test_rows_of_others_are_passed_over_and_refusals_counted():
    refused = {"case": "1", "kind": "k", "order": 0, "arm": "a", "refused": "too long"}
    found, arms = add_up([row("0", "a"), refused, row("0", "b"), row("elsewhere", "a")])
    assert (arms["a"]["n"], arms["a"]["refused"]) == (1, {"too long": 1})
    assert "b" not in arms and arms["full-prefill"]["cost"] == {} and found["slices"] == {"all": 2}
