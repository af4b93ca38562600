"""Calibrating a model: what is chosen, when it stops, what is kept, and what cannot be asked."""

import numpy as np
import pytest

from ragkv import (
    ArgumentError,
    ArgumentTypeError,
    CacheBlend,
    CalibrationError,
    Engine,
    FullPrefill,
    LegoLink,
    MethodError,
    ModelChangedError,
    PromptTemplate,
    Reuse,
    SensitiveTokens,
    StoreError,
    TieredStore,
    Union,
    bundled,
)
from ragkv.calibration import kept
from ragkv.calibration.cases import Trial, one_each, trials_of
from ragkv.calibration.goal import Goal
from ragkv.calibration.ladder import Ladder
from ragkv.evaluation import Case
from ragkv.evaluation.cases import everything
from ragkv.testing import random_ids, tiny_model

from .conftest import TEMPLATE, cases_of, near_model


def test_an_exact_model_needs_few_cases(engine):
    """One document a prompt, its chunks in order: nothing is off, and the cheapest method is accepted as soon as it can be."""
    cases = [([*engine.add_document([random_ids(5, n), random_ids(4, 500 + n)])], random_ids(3, n)) for n in range(22)]
    seen = []
    found = engine.calibrate(cases, kl=0.2, ladder=[LegoLink(4), Reuse()], progress=seen.append)
    assert (found.chosen, found.method) == ("reuse", Reuse())
    assert found.cases == len(seen) == 18 and found.given == 22
    assert [(rung.method, rung.verdict, rung.cases) for rung in found.rungs] == [
        ("lego-link:k=4", "under", 18),
        ("reuse", "under", 18),
    ]
    assert all(rung.mean < 1e-6 and rung.upper <= 0.2 for rung in found.rungs)
    assert seen[-1] == found and seen[0].cases == 1 and seen[0].chosen == "full-prefill"
    prompt = engine.fuse(*cases[0], method="calibrated")
    assert prompt.report.method == "Calibrated(Reuse())"


def test_a_model_that_is_far_off_is_prefilled_in_full(engine):
    far = Engine(tiny_model(), template=TEMPLATE, method=Reuse())
    cases = cases_of(far, 20)
    found = far.calibrate(cases, kl=0.2, ladder=["lego-link:k=1", "reuse"])
    assert found.chosen == "full-prefill" and found.rungs[0].verdict in ("over", "open")
    assert found.rungs[1].verdict == "behind" and found.cases < 20
    prompt = far.fuse(*cases[0], method="calibrated")
    assert prompt.report.method == "Calibrated(FullPrefill())" and prompt.report.budget == 1


def test_the_ladder_ends_at_the_first_that_is_not_proved(engine):
    """A cheaper one that happens to be good is not taken: its order was fixed before."""
    far = Engine(tiny_model(), template=TEMPLATE, method=Reuse())
    cases = cases_of(far, 12)
    found = far.calibrate(cases, kl=0.3, ladder=[LegoLink(1), LegoLink(1000)])
    assert found.chosen == "full-prefill"
    found = far.calibrate(cases, kl=0.3, ladder=[LegoLink(1000), LegoLink(1)])
    assert found.chosen == "lego-link:k=1000"


@pytest.mark.parametrize(("loss", "verdict", "asked"), [(0.15, "open", 18), (0.6, "over", 4)])
def test_nothing_behind_it_is_tried_or_chosen(loss, verdict, asked):
    """Though the cheaper one is never off: proved before the dearer one was given up, or not asked any more."""
    ladder = Ladder([SensitiveTokens(0.3), Reuse()], Goal("kl", 0.2))
    for left in range(40, 0, -1):
        for rung in ladder.open(left):
            rung.add(loss if rung is ladder.rungs[0] else 0.0, 0.1)
    assert ladder.chosen == FullPrefill() and ladder.open(0) == []
    assert [rung.verdict for rung in ladder.reports()] == [verdict, "behind"] and ladder.reports()[1].cases == asked


@pytest.mark.parametrize("means", [(0.02, 0.1, 0.3, 0.02), (0.1, 0.1, 0.1, 0.1)])
def test_a_whole_ladder_is_wrong_as_rarely_as_one_test(means):
    """Candidates of these mean losses against a bound of 0.1, over the same cases: all but one of 0.02 in front are bad."""
    goal, wrong, streams = Goal("kl", 0.1), 0, 120
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        ladder = Ladder([SensitiveTokens(ratio) for ratio in (0.4, 0.3, 0.2, 0.1)], goal)
        for left in range(80, 0, -1):
            luck = rng.random()  # of the case: all candidates share it
            for rung in ladder.open(left):
                rung.add(float(luck < means[ladder.rungs.index(rung)]), 0.1)
        good = [FullPrefill(), *[r.method for r in ladder.rungs[:1] if means[0] < 0.1]]
        wrong += ladder.chosen not in good
    assert wrong / streams <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / streams)


def test_a_call_that_was_stopped_goes_on(engine, monkeypatch):
    cases, fused = cases_of(engine, 16), []
    fuse = Engine.fuse
    monkeypatch.setattr(Engine, "fuse", lambda self, *args, **more: (fused.append(1), fuse(self, *args, **more))[1])

    def stop(so_far):
        if so_far.cases == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.calibrate(cases, kl=0.3, ladder=[Reuse()], progress=stop)
    assert len(fused) == 14  # a full prefill and a prompt of the candidate, for each case
    found = engine.calibrate(cases, kl=0.3, ladder=[Reuse()])
    assert len(fused) == 2 * found.cases > 14 and found.rungs[0].cases == found.cases
    monkeypatch.undo()
    assert found == Engine(engine.model, template=TEMPLATE, store=engine.store, method=Reuse()).calibrate(
        cases, kl=0.3, ladder=[Reuse()]
    )


def test_the_same_seed_asks_in_the_same_order(engine):
    cases = cases_of(engine, 14)
    anew = [Engine(engine.model, template=TEMPLATE, method=Reuse()) for _ in range(3)]
    options = {"kl": 0.3, "ladder": [Reuse()]}
    one, two, other = (each.calibrate(cases, **options, seed=seed) for each, seed in zip(anew, (1, 1, 2), strict=True))
    assert one == two and one.rungs[0].mean != other.rungs[0].mean
    assert anew[0].calibrate(cases, **options, seed=2) == one  # luck is tried once


def test_more_cases_come_behind_those_that_were_asked(engine):
    """In another order their losses would be a second test, and whoever adds cases until one is passed had as many chances."""
    seen, again, options = [], [], {"kl": 0.2, "ladder": [Reuse()]}

    def stop(so_far):
        seen.append(so_far.rungs)
        if len(seen) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.calibrate(cases_of(engine, 22), **options, progress=stop)
    engine.calibrate(cases_of(engine, 44), **options, seed=3, progress=lambda so_far: again.append(so_far.rungs))
    assert again[:8] == seen and len(again) > 8


@pytest.mark.parametrize("bound", [{"top1": 0.3}, {"kl": 0.3}])
def test_first_tokens_are_compared_without_decoding(engine, bound, monkeypatch):
    monkeypatch.setattr(Engine, "generate", None)
    cases = [([*engine.add_document([random_ids(5, n)])], random_ids(3, n)) for n in range(20)]
    assert engine.calibrate(cases, ladder=[Reuse()], **bound).chosen == "reuse"


@pytest.fixture(scope="module")
def tokenizer():
    return bundled.load()[1]


def case(number, **changes):
    documents = (("Anna lives in the north.", f"She plays harp {number}."), ("Oslo lies on a river.",))
    fields = {"question": "What does Anna play?", "answers": ("harp",), "documents": documents}
    return Case(**{"id": f"{number}", "kind": "k", "retrieved": everything(documents), **fields, **changes})


def test_cases_bring_their_documents_along(tokenizer, monkeypatch):
    """They are read in memory and leave nothing in the store but what was found."""
    engine = Engine(tiny_model(vocab_size=1792), tokenizer, template=PromptTemplate(**bundled.TEMPLATE))
    cases, generate = [case(number) for number in range(12)] + [case(99, answers=())], Engine.generate
    found = engine.calibrate(cases, f1=0.3, ladder=["reuse"], max_new_tokens=3)
    said = []
    monkeypatch.setattr(Engine, "generate", lambda *args, **more: (said.append(1), generate(*args, **more))[1])
    engine.calibrate(cases, f1=0.3, ladder=["reuse"], max_new_tokens=3)
    assert not said
    engine.calibrate(cases, f1=0.3, ladder=["reuse"], max_new_tokens=4, limit=12)
    assert said, "shorter answers are others"
    assert found.metric == "f1" and found.cases + sum(found.left_out.values()) <= 13
    assert set(found.left_out) <= {"no answer"} and found.rungs[0].cases == found.cases > 3
    assert engine.store.stats().entries["cpu"] == 0
    [trial] = trials_of(engine, cases[:1], [Reuse()])
    with trial.chunks() as chunks:
        assert len(chunks) == 3 <= trial.engine.store.stats().entries["cpu"]
    assert trial.engine.store.stats().entries["cpu"] == 0


def test_cases_about_one_document_are_one_draw(tokenizer):
    """The document decides what they lose, so that many of them prove no more than one; documents apart are draws of their own."""
    engine = Engine(tiny_model(vocab_size=1792), tokenizer, template=PromptTemplate(**bundled.TEMPLATE))
    alike = [case(5, id=f"same {number}", question=f"What is {number}?") for number in range(40)]
    with pytest.raises(
        CalibrationError, match=r"^1 cases cannot.*left out were \{'about the document of another case': 39\}"
    ):
        engine.calibrate(alike, kl=0.5, ladder=["reuse"])
    unanswered = [case(number, id=f"no {number}", answers=("",)) for number in range(8)]
    found = engine.calibrate(
        [*unanswered, *(case(n) for n in range(8)), *alike], f1=0.4, ladder=["reuse"], limit=7, max_new_tokens=1
    )
    assert found.left_out == {"no answer": 8, "about the document of another case": 40} and found.given == 7 + 48
    assert 0 < found.cases <= 7


def test_which_of_a_documents_cases_is_drawn_is_chance():
    class About(Trial):
        about = property(lambda self: self.question // 2)

    trials = [About(None, number, (), list) for number in range(6)]
    assert [trial.question for trial in one_each(trials)] == [0, 2, 4]
    assert [trial.question for trial in one_each(reversed(trials))] == [5, 3, 1]


def test_answers_of_one_case_are_decoded_side_by_side(tokenizer, monkeypatch):
    """What they say is what they say one by one, refusals included."""
    model = tiny_model(vocab_size=1792, initializer_range=0.2)
    cases = [case(number, answers=("harp", "the")) for number in range(4)]
    ladder, found = ["cache-blend:check_layer=9", "lego-link:k=2", "reuse"], []
    for alone in (False, True):
        engine = Engine(model, tokenizer, template=PromptTemplate(**bundled.TEMPLATE))
        steps = engine.runner.steps()
        steps.sizes.clear()
        if alone:
            one_by_one = lambda ask, items: [ask(item) for item in items]  # noqa: E731
            monkeypatch.setattr("ragkv.calibration.run.side_by_side", one_by_one)
        found.append(engine.calibrate(cases, f1=0.6, ladder=ladder, max_new_tokens=6).as_dict())
        assert (sum(steps.sizes.elements()) > steps.sizes.total()) != alone
    assert found[0] == found[1] and found[0]["rungs"][0]["verdict"] == "refused"
    assert 0 < found[0]["rungs"][2]["cases"] <= 4


def test_the_same_passage_in_another_context_is_another_case(engine):
    behind, [alone] = engine.add_document([random_ids(8), random_ids(6)])[1], engine.add([random_ids(6)])
    one, other, again = (trial.key() for trial in trials_of(engine, [([c], [7]) for c in (behind, alone, behind)], []))
    assert behind.ids == alone.ids and one == again != other


def test_what_is_no_answer_is_none(engine):
    """Neither is the word None one, nor a blank that an empty reply would match."""
    given = [["harp", None, " "], 7, None, [["harp"], ["the harp"]]]
    asked = [([[5, 6]], [7], answers) for answers in given]
    asked.append({"question": "How many?", "answer": 0})
    answers = [trial.answers for trial in trials_of(engine, asked, [], find=list)]
    assert answers == [("harp",), ("7",), (), ("harp", "the harp"), ("0",)]


def test_confidence_is_said_as_it_is():
    assert Goal("kl", 0.1, 0.999).said.endswith("under 0.1 with 99.9% confidence")


def test_an_answer_may_gain():
    test = Goal("f1", 0.02).test()
    test.add(-1.0)
    assert test.mean == -1


def test_a_model_that_changes_meanwhile_is_an_error():
    own = near_model(seed=6)
    engine = Engine(own, template=TEMPLATE, method=Reuse())

    def change(so_far):
        own.lm_head.weight.requires_grad_(False)[5] += 1

    with pytest.raises(ModelChangedError, match="changed while it was calibrated: do it again"):
        engine.calibrate(cases_of(engine, 9), kl=0.5, ladder=[Reuse()], progress=change)
    assert not kept.results(engine.store)


def test_what_cannot_be_asked_is_counted(engine):
    cases = [*cases_of(engine, 12), *[([random_ids(1990), random_ids(90)], [7])] * 30]
    found = engine.calibrate(cases, kl=0.5, ladder=[Reuse()])
    assert found.left_out["longer than the model's positions"] > 0
    with pytest.raises(CalibrationError, match=r"none of the 30 cases could be asked.*longer than"):
        engine.calibrate(cases[12:], kl=0.5, ladder=[Reuse()])
    with pytest.raises(CalibrationError, match=r"none of the 30 cases could be asked.*the question is empty"):
        engine.calibrate([([[5, 6]], [])] * 30, kl=0.5, ladder=[Reuse()])


def test_what_a_model_cannot_run_is_left_out(engine, monkeypatch):
    found = engine.calibrate(cases_of(engine, 10), kl=0.5, ladder=[CacheBlend(0.5, check_layer=9), Reuse()])
    assert [rung.verdict for rung in found.rungs] == ["refused", "under"] and "check_layer 9" in found.rungs[0].refused
    assert found.chosen == "reuse"


def test_too_few_cases_are_refused_before_anything_is_run(engine, monkeypatch):
    cases = cases_of(engine, 10)
    monkeypatch.setattr(Engine, "fuse", None)
    with pytest.raises(CalibrationError, match=r"10 cases cannot prove it.*give at least 39, or a wider bound"):
        engine.calibrate(cases)
    with pytest.raises(CalibrationError, match="10 cases cannot"):
        engine.calibrate(cases * 9, limit=10)
    with pytest.raises(CalibrationError, match="give at least 4031582445, "):
        engine.calibrate(cases, kl=1e-9)
    with pytest.raises(CalibrationError, match="0 cases"):
        engine.calibrate([])


def test_what_could_not_be_kept_is_not_begun(model, tmp_path, monkeypatch):
    with Engine(model, template=TEMPLATE, method=Reuse(), store=TieredStore(tmp_path)) as engine:
        cases = cases_of(engine, 1) * 20
    monkeypatch.setattr(Engine, "fuse", None)
    with (
        Engine(model, template=TEMPLATE, store=TieredStore(tmp_path, readonly=True)) as engine,
        pytest.raises(StoreError, match="read"),
    ):
        engine.calibrate(cases, kl=0.5, ladder=[Reuse()])


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"kl": 0.1, "f1": 0.1}, ArgumentError, "one of kl=, top1= and f1="),
        ({"kl": 2.0}, ArgumentError, "less than the cap of 1 nats"),
        ({"top1": 1.0}, ArgumentError, "less than 1, got 1"),
        ({"f1": "0.1"}, ArgumentTypeError, "f1 must be a number"),
        ({"confidence": 1.0}, ArgumentError, "confidence must be between 0 and 1"),
        ({"cap": 0}, ArgumentError, "cap must be more than 0"),
        ({"cap": float("inf")}, ArgumentError, "no number of cases proves a mean under 0.1 of what may be inf"),
        ({"kl": 1e-17}, ArgumentError, "no number of cases proves"),
        ({"limit": 0}, ArgumentError, "limit must be >= 1"),
        ({"ladder": []}, ArgumentError, "at least one method"),
        ({"ladder": ["reuse", Reuse()]}, ArgumentError, "none twice"),
        ({"ladder": "reuse"}, ArgumentTypeError, "ladder must be a list"),
        ({"ladder": ["nonsense"]}, MethodError, "no method 'nonsense'"),
        ({"ladder": ["full-prefill"]}, MethodError, "is not tried"),
        ({"ladder": ["calibrated"]}, MethodError, "is not tried"),
        ({"ladder": [Union(Reuse(), Reuse())]}, ArgumentError, "no name in words"),
    ],
)
def test_what_makes_no_sense_is_refused(engine, options, kind, said):
    with pytest.raises(kind, match=said):
        engine.calibrate([([[5, 6]], [7])] * 50, **options)


@pytest.mark.parametrize(
    "cases",
    [
        "a question",
        ["a question"],
        [{"question": "a?"}],
        [([[5, 6]],)],
        [(5, [7])],
        {},
        [("a passage", [7])],
        [([[5, 6]], [7], True)],
        [([[5, 6]], [7], {"text": "a"})],
    ],
)
def test_what_is_no_case_is_refused(engine, cases):
    with pytest.raises(ArgumentTypeError, match="each of cases must be"):
        engine.calibrate(cases)
