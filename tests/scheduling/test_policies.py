"""What each policy guarantees, by simulation: at most so many are answered at once, each step gives each of them one token."""

import random

import pytest

from ragkv import ArgumentError, ArgumentTypeError, CachedFirst, Fair
from ragkv.scheduling.policies import POLICIES, FirstComeFirstServed
from ragkv.scheduling.ticket import Ticket


class Line:
    """Does what a scheduler does with a policy, without threads."""

    def __init__(self, policy, at_once=1):
        self.policy, self.at_once = policy, at_once
        self.waiting, self.running, self.began = [], {}, []
        self._number = 0

    def ask(self, namespace="", tokens=10, reused=0, output=1):
        ticket = Ticket(namespace, tokens, reused=reused)
        self._number += 1
        ticket.number, ticket.output = self._number, output
        self.policy.joined(ticket, list(self.waiting))
        self.waiting.append(ticket)
        return ticket

    def step(self):
        for ticket in list(self.running):
            self.policy.spent(ticket, output=1)
            self.running[ticket] -= 1
            if not self.running[ticket]:
                del self.running[ticket]
        while self.waiting and len(self.running) < self.at_once:
            first = self.policy.next(self.waiting)
            self.waiting.remove(first)
            self.policy.began(first, self.waiting)
            self.running[first] = first.output
            self.began.append(first)

    def finish(self):
        while self.waiting or self.running:
            self.step()
        return self.began


def test_first_come_first_served():
    line = Line(FirstComeFirstServed(), 2)
    asked = [line.ask(reused=number % 3, output=1 + number % 4) for number in range(20)]
    assert line.finish() == asked


def test_whoever_has_the_most_stored_for_what_is_to_compute_goes_first():
    line = Line(CachedFirst())
    asked = [line.ask(tokens=tokens, reused=reused) for tokens, reused in ((100, 50), (10, 9), (10, 0), (1000, 990))]
    assert line.finish() == [asked[number] for number in (3, 1, 0, 2)]
    assert POLICIES["cached-first"]().looks and not FirstComeFirstServed().looks


@pytest.mark.parametrize("window", [0, 1, 7, 32])
@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_overtaken_more_often_than_the_window_says(window, seed):
    rng, line = random.Random(seed), Line(CachedFirst(window), 2)
    for _ in range(300):
        for _ in range(rng.choice([0, 0, 1, 2])):
            line.ask(tokens=100, reused=rng.choice([0, 0, 50, 99]), output=rng.randrange(1, 4))
        line.step()
    began = line.finish()
    for place, ticket in enumerate(began):
        assert sum(other.number > ticket.number for other in began[:place]) <= window
    assert window or began == sorted(began, key=lambda ticket: ticket.number)


def served(line, names, cost, steps, rng):
    """Weighted tokens that each namespace was served until each step; all of them always have something waiting."""
    done, total, before = [], dict.fromkeys(names, 0.0), 0
    for _ in range(steps):
        for name, (tokens, reused, output) in names.items():
            while sum(ticket.namespace == name for ticket in line.waiting) < 3:
                line.ask(name, rng.randrange(1, tokens), output=rng.randrange(1, output), reused=0)
                line.waiting[-1].reused = int(reused * line.waiting[-1].tokens)
        for ticket in line.running:
            total[ticket.namespace] += cost.output
        line.step()
        for ticket in line.began[before:]:
            total[ticket.namespace] += cost.reused * ticket.reused + cost.computed * ticket.computed
        before = len(line.began)
        done.append(dict(total))
    return done


@pytest.mark.parametrize("slack", [0, 500, 4096])
@pytest.mark.parametrize("seed", range(4))
def test_namespaces_are_served_alike(slack, seed):
    """VTC's bound, arXiv:2401.00588, theorem 4.4, and the slack."""
    rng, fair, at_once = random.Random(seed), Fair(slack=slack), 4
    names = {"greedy": (4000, 0.0, 200), "cached": (4000, 0.9, 20), "small": (200, 0.0, 20)}
    done = served(Line(fair, at_once), names, fair, 4000, rng)
    bound = 2 * (slack + fair.computed * 4000 + fair.output * at_once * 200)
    for one in names:
        for other in names:
            apart = [now[one] - now[other] for now in done]
            assert max(apart) - min(apart) <= bound
    assert min(done[-1].values()) > 2 * bound  # and first come, first served does not keep it:
    unfair = served(Line(FirstComeFirstServed(), at_once), names, fair, 4000, random.Random(seed))
    assert unfair[-1]["greedy"] - unfair[-1]["small"] > bound


def test_the_slack_is_for_what_is_stored():
    def order(slack):
        line = Line(Fair(slack=slack))
        for number in range(6):
            line.ask("stored" if number % 2 else "new", tokens=100, reused=90 if number % 2 else 0)
        return [ticket.namespace for ticket in line.finish()]

    assert order(0)[:2] in (["new", "stored"], ["stored", "new"]) and order(0).index("new") < 3
    assert order(4096) == ["stored"] * 3 + ["new"] * 3


@pytest.mark.parametrize(("others", "place"), [("a", 2), ("b", 5)])
def test_only_those_of_its_own_namespace_overtake_a_request(others, place):
    """Others have their turn by what was served, and give nobody a claim to go before the least served."""
    line = Line(Fair(slack=1e9, window=2))
    first = line.ask("a", tokens=100)
    for _ in range(5):
        line.ask(others, tokens=100, reused=90)
    assert line.finish().index(first) == place


def test_a_share_is_served_more():
    line = Line(Fair({"paying": 3.0}, slack=0))
    done = served(line, {"paying": (100, 0, 5), "free": (100, 0, 5)}, line.policy, 2000, random.Random(0))
    assert done[-1]["paying"] / done[-1]["free"] == pytest.approx(3, rel=0.1)


def test_idleness_earns_nothing():
    """A namespace that comes late is not served alone until it has caught up; one that was served much is not forgiven."""
    line = Line(Fair(slack=0))
    for _ in range(50):
        line.ask("early")
        line.step()
    early = [line.ask("early") for _ in range(6)]
    late = [line.ask("late") for _ in range(6)]
    names = [ticket.namespace for ticket in line.finish()[-12:]]
    assert {*early, *late} == {*line.began[-12:]} and all(names[at : at + 3] != ["late"] * 3 for at in range(8))


def test_counters_of_those_who_are_gone_are_dropped(monkeypatch):
    monkeypatch.setattr("ragkv.scheduling.policies._MOST_IDLE", 10)
    line = Line(Fair())
    for number in range(200):
        line.ask(str(number))
        line.finish()
    assert len(line.policy.served) <= 11


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Fair(slack=-1), ArgumentError),
        (lambda: Fair(output=float("nan")), ArgumentError),
        (lambda: Fair({"a": 0}), ArgumentError),
        (lambda: CachedFirst(-1), ArgumentError),
        (lambda: CachedFirst(1.5), ArgumentTypeError),
    ],
)
def test_bad_knobs_are_named(make, error):
    with pytest.raises(error, match="must be"):
        make()
