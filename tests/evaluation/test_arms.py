"""Arms as words."""

import pytest

from ragkv.evaluation import Case, EvaluationError, parse_arms
from ragkv.methods import CacheBlend, FullPrefill, LegoLink, Reuse


def names(*words, budgets=(0.1,)):
    return [arm.name for arm in parse_arms(words, budgets)]


def test_words_name_arms():
    assert names("full-prefill", "reuse@document") == ["full-prefill", "reuse@document"]
    assert names("reuse") == ["reuse@alone", "reuse@document"]
    assert names("no-rotation@alone", "no-rotation") == ["no-rotation@alone", "no-rotation@document"]
    assert names("cache-blend:gradual=0.3/0.2@alone") == ["cache-blend:gradual=0.3/0.2@alone"]
    (arm,) = parse_arms(["cache-blend:ratio=0.2,signal=key@alone"], [])
    assert (arm.method, arm.family, arm.context) == (CacheBlend(0.2, signal="key"), "cache-blend", "alone")


def test_a_method_without_its_share_is_run_at_every_budget():
    arms = {arm.name: arm for arm in parse_arms(["cache-blend@alone", "lego-link@document"], [0.1, 0.2])}
    assert list(arms) == [
        "cache-blend:ratio=0.1@alone",
        "cache-blend:ratio=0.2@alone",
        "lego-link:k=10%@document",
        "lego-link:k=20%@document",
    ]
    assert arms["cache-blend:ratio=0.2@alone"].method_for([10], {}) == CacheBlend(0.2)
    assert arms["lego-link:k=10%@document"].method_for([60, 40], {}) == LegoLink(5)
    assert arms["lego-link:k=10%@document"].method_for([2, 2], {}) == LegoLink(1)


def test_the_default_has_every_method_on_both_contexts():
    arms = parse_arms([], [0.05, 0.3])
    assert {"full-prefill", "full-documents", "gold-only", "no-context"} <= {arm.name for arm in arms}
    assert {"prefix-only@document", "no-rotation@alone", "lego-link:k=16@alone"} <= {arm.name for arm in arms}
    assert {"random=cache-blend:ratio=0.15@document", "auto@document"} <= {arm.name for arm in arms}
    for family in (
        "reuse",
        "auto",
        "lego-link",
        "cache-blend",
        "sensitive-tokens",
        "random",
        "oracle",
        "question-aware",
    ):
        contexts = {arm.context for arm in arms if arm.family == family}
        assert contexts == {"alone", "document"}, family
        shares = {"5%", "30%"} if family == "lego-link" else {"0.05", "0.3"}
        at_budgets = {arm.name for arm in arms if any(f"={share}@" in arm.name for share in shares)}
        assert family in ("reuse", "auto") or len([n for n in at_budgets if n.startswith(f"{family}:")]) == 4, family
    assert len({arm.name for arm in arms}) == len(arms)
    assert {arm.method for arm in arms if arm.family == "reuse"} == {Reuse()}
    assert [arm.method for arm in arms if arm.name == "full-documents"] == [FullPrefill()]


def test_which_chunks_an_arm_reads():
    case = Case("1", "k", "q?", ("x",), (("a", "b"), ("c",)), ((1, 0), (0, 1)), gold=((0, 1),))
    places = {arm.name: arm.places(case) for arm in parse_arms(["default"], [0.1])}
    assert places["full-prefill"] == places["reuse@alone"] == case.retrieved
    assert places["full-documents"] == ((1, 0), (0, 0), (0, 1))
    assert places["gold-only"] == ((0, 1),)
    assert places["no-context"] == ()


def test_random_controls_come_last():
    arms = parse_arms(["random=cache-blend:ratio=0.15@alone", "cache-blend:ratio=0.15", "reuse"], [])
    assert arms[-1].like == "cache-blend:ratio=0.15@alone"
    assert arms[-1].context == "alone"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (
            "magic",
            "no arm 'magic'. Besides methods there are: full-prefill, full-documents, .*there are: .*cache-blend",
        ),
        ("reuse@moon", "behind the @ stands one of alone, document"),
        ("lego-link:k=-1", "k must be >= 0 tokens, got -1"),
        ("random=magic", "no arm 'magic@alone'"),
    ],
)
def test_arms_that_do_not_exist(word, reason):
    with pytest.raises(EvaluationError, match=reason):
        parse_arms([word], [0.1])


def test_budgets_are_shares():
    with pytest.raises(EvaluationError, match=r"budgets must lie in 0 \.\. 1"):
        parse_arms(["reuse"], [15])
