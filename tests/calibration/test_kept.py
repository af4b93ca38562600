"""What a calibration chose is used by whoever opens the folder next, and not where model or template are others."""

import logging
import re

import pytest

from ragkv import Calibrated, CalibrationError, Engine, LegoLink, PromptTemplate, Reuse, TieredStore
from ragkv.calibration import kept
from ragkv.testing import random_ids

from .conftest import TEMPLATE, cases_of, near_model


def calibrated(engine):
    cases = cases_of(engine, 9)
    assert engine.calibrate(cases, kl=0.5, ladder=[LegoLink(3)]).chosen == "lego-link:k=3"
    return cases


def methods(engine, case, **more):
    return engine.fuse(*case, **more).report.method


def test_the_next_process_uses_it(model, tmp_path):
    with Engine(model, template=TEMPLATE, store=TieredStore(tmp_path)) as first:
        case = calibrated(first)[0]
    for method in (Calibrated(), "calibrated"):
        again = Engine(model, template=TEMPLATE, store=TieredStore(tmp_path), method=method)
        prompt = again.fuse(*case)
        assert prompt.report.method == "Calibrated(LegoLink(k=3))" and 0 < prompt.report.budget < 1
        want = again.fuse(*case, method=LegoLink(3))
        assert prompt.logits.equal(want.logits) and want.report.method == "LegoLink(k=3)"
        answer = again.generate(*case, max_new_tokens=2)
        assert answer.report.fusion.method == "Calibrated(LegoLink(k=3))"
        again.close()


def test_without_one_it_is_an_error(engine):
    [case] = cases_of(engine, 1)
    with pytest.raises(CalibrationError, match="needs a calibration, and there is none here yet: run 'ragkv calibrate"):
        engine.fuse(*case, method="calibrated")
    with pytest.raises(CalibrationError, match="in no other method"):
        Calibrated().select(None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": near_model(seed=3)}, "another weights"),
        ({"model": near_model(num_hidden_layers=3)}, "another model"),
        ({"template": PromptTemplate(prefix=[1, 5, 7], after_chunk=[10])}, "another template prefix"),
        (
            {"template": PromptTemplate(prefix=[1, 5, 6], after_chunk=[10], after_question=[9])},
            "another template around",
        ),
        ({"template": PromptTemplate(prefix=[1, 5, 6])}, "another template around"),
        ({"context": "chunk"}, r"another context \(document, now chunk\)"),
        ({"foreign": random_ids(30)}, "another foreign text"),
    ],
    ids=["weights", "configuration", "prefix", "after the question", "after a chunk", "context", "foreign"],
)
def test_another_model_or_template_makes_it_void_by_name(at, model, change, said, caplog):
    first = at(model)
    calibrated(first)
    other = at(**{"model": model, "method": "calibrated", "sensitivity": False, **change})
    cases = cases_of(other, 2)
    with caplog.at_level(logging.WARNING):
        prompts = [other.fuse(*case) for case in cases]
    for prompt in prompts:
        assert prompt.report.method.startswith("Calibrated(FullPrefill(), void: another ") and prompt.report.budget == 1
        assert re.search(said, prompt.report.method)
    assert [record.message for record in caplog.records if "void" in record.message][1:] == []  # once
    assert re.search(said + ".* than it was made with; run it again", caplog.text)


def test_several_models_have_each_its_own(at, model):
    one, two = at(model), at(near_model(seed=3))
    case = calibrated(one)[0]
    assert two.calibrate(cases_of(two, 9), kl=0.5, ladder=[Reuse()]).chosen == "reuse"
    assert methods(two, case, method="calibrated") == "Calibrated(Reuse())"
    assert methods(one, case, method="calibrated") == "Calibrated(LegoLink(k=3))"


def test_what_was_measured_of_one_model_is_not_taken_for_anothers(at, model, monkeypatch):
    one, two = at(model), at(near_model(seed=3))
    calibrated(one)
    fused, fuse = [], Engine.fuse
    monkeypatch.setattr(Engine, "fuse", lambda self, *args, **more: (fused.append(1), fuse(self, *args, **more))[1])
    calibrated(one)
    assert not fused
    calibrated(two)
    assert fused


def test_a_model_that_changes_in_place(model):
    own = near_model(seed=5)
    engine = Engine(own, template=TEMPLATE, method=Reuse())
    case = calibrated(engine)[0]
    assert methods(engine, case, method="calibrated") == "Calibrated(LegoLink(k=3))"
    own.lm_head.weight.requires_grad_(False)[5] += 1
    assert methods(engine, case, method="calibrated") == "Calibrated(FullPrefill(), void: another weights)"


def test_a_system_message_is_another_prompt(engine):
    """Of a call, in the place of the template's: its passages are read behind it, and nothing was proved of that."""
    calibrated(engine)
    case = cases_of(engine, 1)[0]
    documents = engine.prompting.documents_for(None, None)
    other = documents.within(None, (1, 5, 6, 7))
    assert isinstance(kept.resolved(Calibrated(), documents), type(kept.resolved(Calibrated(), other)))
    assert (
        kept.resolved(Calibrated(), other).void == "template prefix" and not kept.resolved(Calibrated(), documents).void
    )
    assert methods(engine, case, method="calibrated") == "Calibrated(LegoLink(k=3))"


def test_the_next_turn_uses_it_too(engine):
    case = calibrated(engine)[0]
    first = engine.generate(*case, method="calibrated", max_new_tokens=2, keep_past=True)
    more = engine.add([random_ids(9, 77)])
    second = engine.generate(more, random_ids(3, 5), method="calibrated", past=first.past, max_new_tokens=2)
    assert second.report.fusion.method == "Calibrated(LegoLink(k=3))"


def test_documents_are_read_as_what_was_chosen_needs(engine, reads):
    """LegoLink needs no sensitivity: chunks that were read without are not read again for it."""
    case = calibrated(engine)[0]
    seen = reads(engine)
    engine.fuse(*case, method="calibrated")
    assert not seen


def test_only_the_last_results_are_kept(engine):
    for number in range(20):
        kept.keep_result(engine.store, {"setting": f"{number}", "chosen": "reuse"})
    kept.keep_result(engine.store, {"setting": "19", "chosen": "lego-link"})
    found = kept.results(engine.store)
    assert [result["setting"] for result in found] == [f"{number}" for number in range(4, 20)]
    assert found[-1]["chosen"] == "lego-link"
