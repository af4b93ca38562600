"""The guarantee of a calibration, by simulation: bad candidates are rarely accepted, good ones soon."""

import numpy as np
import pytest

from ragkv.calibration.betting import MeanTest, wealth

STREAMS, LONGEST = 1000, 400
NOISE = 3 * np.sqrt(0.05 * 0.95 / STREAMS)


def accepted(draw, bound, worst=1.0):
    """The share of streams that are accepted by somebody who looks after each case, and stops as soon as he may."""
    losses = np.stack([draw(np.random.default_rng(seed)).astype(float) for seed in range(STREAMS)])
    return (wealth(losses, bound, worst) >= 20).any(axis=1).mean()


#: Losses whose mean is the bound of 0.1 exactly, or a hair more: to accept any of them is false.
AT_THE_BOUND = {
    "rare and whole": lambda rng: rng.random(LONGEST) < 0.1,
    "rarer and half": lambda rng: 0.5 * (rng.random(LONGEST) < 0.2),
    "even": lambda rng: rng.uniform(0, 0.2, LONGEST),
    "heavy tail": lambda rng: rng.beta(0.1, 0.9, LONGEST),
    "all alike": lambda rng: np.full(LONGEST, 0.1),
}


@pytest.mark.parametrize("losses", AT_THE_BOUND.values(), ids=AT_THE_BOUND)
def test_what_is_not_under_the_bound_is_rarely_accepted(losses):
    assert accepted(losses, 0.1) <= 0.05 + NOISE


def test_a_test_that_ignores_its_looks_would_be_found_out():
    """The same streams, judged after each case by the usual interval of a mean: far more than 5 % are accepted."""
    false = 0
    for seed in range(STREAMS):
        losses = AT_THE_BOUND["rare and whole"](np.random.default_rng(seed)).astype(float)
        counts = np.arange(1, LONGEST + 1)
        means = np.cumsum(losses) / counts
        ends = means + 1.645 * np.sqrt(means * (1 - means) / counts)
        false += bool((ends[20:] < 0.1).any())
    assert false / STREAMS > 0.15


def test_signed_losses_keep_the_guarantee():
    """A difference of F1 is between -1 and 1, and half of the streams' cases gain."""

    def draw(rng):
        return rng.choice([-1.0, 0.0, 1.0], LONGEST, p=[0.09, 0.8, 0.11])

    assert accepted(draw, 0.02) <= 0.05 + NOISE


def test_the_test_counts_as_the_formula():
    losses = np.random.default_rng(3).uniform(-1, 1, 80) ** 3
    test = MeanTest(0.3, -1.0, 1.0, 0.95)
    for number, loss in enumerate(losses, 1):
        test.add(loss)
        assert test.under == (wealth(losses[:number], 0.3, 1.0) >= 20).any()
        assert test.over == (wealth(-losses[:number], -0.3, 1.0) >= 20).any()
    assert test.under


def cases_until(accepts, draw, **limits):
    rng = np.random.default_rng(0)
    test = MeanTest(limits.get("bound", 0.1), limits.get("least", 0.0), 1.0, 0.95)
    while not accepts(test):
        test.add(float(draw(rng)))
        assert len(test.losses) < 1000
    return len(test.losses)


def test_a_good_candidate_is_accepted_with_few_cases():
    assert cases_until(lambda test: test.under, lambda rng: 0.0) == 39
    assert cases_until(lambda test: test.under, lambda rng: rng.exponential(0.02)) < 60
    assert cases_until(lambda test: test.under, lambda rng: rng.exponential(0.05)) < 110


def test_a_bad_candidate_is_given_up_soon():
    assert cases_until(lambda test: test.over, lambda rng: rng.uniform(0, 1)) < 30
    assert cases_until(lambda test: test.over, lambda rng: 1.0) < 6


def test_the_upper_end_agrees_with_the_verdict():
    rng, both = np.random.default_rng(1), set()
    for bound in (0.05, 0.1, 0.3):
        test = MeanTest(bound, 0.0, 1.0, 0.95)
        for number, loss in enumerate(rng.exponential(0.06, 120)):
            test.add(loss)
            if not number % 10:
                assert test.under == (test.upper <= bound + 1e-9)
                both.add(test.under)
        assert test.mean < test.upper
    assert both == {True, False}


def test_without_cases_nothing_is_known():
    test = MeanTest(0.1, 0.0, 1.0, 0.95)
    assert not test.under and not test.over
    assert test.upper == pytest.approx(1.0) and test.mean == 0.0
    assert test.hopeless(38) and not test.hopeless(39)


def test_beyond_the_cap_counts_as_the_cap():
    test = MeanTest(0.1, 0.0, 1.0, 0.95)
    test.add(17.0)
    test.add(-1e-9)
    assert test.losses == [1.0, 0.0]


@pytest.mark.filterwarnings("error")
def test_many_cases_are_no_number_too_large():
    losses = np.random.default_rng(5).choice([-1.0, 0.0, 1.0], 3000, p=[0.2, 0.6, 0.2])
    test = MeanTest(0.02, -1.0, 1.0, 0.95)
    assert not test.hopeless(5000)
    for loss in losses:
        test.add(loss)
        assert not test.under
    assert not test.hopeless(5000)
    assert 0 < test.upper < 0.1
