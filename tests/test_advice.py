"""What advice says follows from its figures."""

import json

import pytest

from ragkv import (
    Auto,
    CacheBlend,
    Engine,
    FullPrefill,
    LegoLink,
    PromptTemplate,
    QuestionAware,
    RelevantTokens,
    Reuse,
    TieredStore,
    Union,
)
from ragkv.advice import Advice
from ragkv.calibration.kept import keep_result, setting
from ragkv.store import CostProfile, Loading, Rates
from ragkv.testing import tiny_model

#: A millisecond a token, wherever it stands.
COSTS = CostProfile((0, 1000), (0, 1000), ((0.0, 1.0), (0.0, 1.0)))


def advice(budget=0.0, passes=1, beside=False, question=False, **tiers):
    rates = Rates(COSTS, tiers, beside=beside)
    lengths = (100, 1000)
    codecs = {"raw": 100.0, "int8": 50.5}
    return Advice("a machine", rates, codecs, "raw", "", budget, question, passes, lengths, 5000, 1000)


def test_from_where_a_tier_pays():
    said = advice(
        fast=Loading(1e6, 100), started=Loading(1e6, 100, 0.5), slow=Loading(5e4, 100), equal=Loading(1e5, 100)
    )
    assert said.full_s(968) == pytest.approx(1.0)
    assert said.reuse_s("fast", 1000) == pytest.approx(0.1 + 0.032)
    assert said.pays_from("fast") == 1
    assert said.pays_from("started") == 556, "0.5 s are 555.6 tokens at 0.9 ms saved each"
    assert said.pays_from("slow") is None is said.pays_from("equal")
    looking = advice(fast=Loading(1e6, 100), question=True)
    assert looking.reuse_s("fast", 1000) == pytest.approx(0.1 + 2 * 0.032)
    side = advice(beside=True, fast=Loading(1e6, 100))
    assert side.reuse_s("fast", 100) == pytest.approx(0.032) and side.reuse_s("fast", 1000) == pytest.approx(0.1)


def test_how_many_uses_pay_for_reading():
    half = Loading(2e5, 100)
    assert advice(disk=half).uses("disk", 1000) == 2
    assert advice(disk=half, passes=2).uses("disk", 1000) == 4
    assert advice(disk=half, budget=0.25).uses("disk", 1000) == 4, "a quarter computed all the same"
    assert advice(disk=half, budget=0.5).uses("disk", 1000) is None


def test_what_a_corpus_takes():
    said = advice(passes=2, disk=Loading(1e6, 100)).as_dict(10_000)
    assert said["corpus"] == {"tokens": 10_000, "seconds": pytest.approx(20.0), "bytes": {"raw": 1e6, "int8": 505_000}}
    assert said["prefill"] == [{"tokens": 1000, "seconds": 1.0, "tokens_per_s": 1000.0}]
    disk = said["tiers"]["disk"]
    assert disk["pays_from_tokens"] == 1 and disk["tokens_per_s"] == 10_000
    assert disk["seconds"] == {"100": pytest.approx(0.042), "1000": pytest.approx(0.132)}
    json.dumps(said)


def test_bytes_of_a_token_are_those_that_are_stored(tmp_path):
    """Of codecs whose size hangs on shapes alone: what is said is what a chunk then takes."""
    template = PromptTemplate(prefix=[1])
    for codec in ("raw", "int8", "fp8"):
        store = TieredStore(tmp_path / codec, codec=codec, cpu_bytes=0)
        with Engine(tiny_model(), template=template, store=store, method=Reuse()) as engine:
            engine.add([[5] * 64])
            said = engine.advise(limit_s=0.1)
            assert said.codec == codec
            assert said.codec_bytes[codec] * 64 == pytest.approx(store.stats().bytes["disk"], rel=0.02)


@pytest.mark.parametrize(
    ("method", "runs"), [(Auto(), False), (Auto(RelevantTokens()), True), (Union(Reuse(), QuestionAware()), True)]
)
def test_whether_the_question_is_run_first(method, runs):
    with Engine(tiny_model(), template=PromptTemplate(prefix=[1]), method=method) as engine:
        assert engine.advise(limit_s=0.1).runs_question == runs


def test_of_a_calibration_it_is_what_was_chosen():
    with Engine(tiny_model(), template=PromptTemplate(prefix=[1]), method="calibrated") as engine:
        assert engine.advise(limit_s=0.1).method == "Calibrated()", "there is none yet"
        kept = {"setting": setting(engine.documents), "chosen": "relevant-tokens:ratio=0.3", "made_with": {}}
        keep_result(engine.store, kept)
        said = engine.advise(limit_s=0.1)
    assert (said.budget, said.runs_question, said.method) == (0.3, True, repr(RelevantTokens(0.3)))


def test_where_that_is_void_prompts_are_prefilled_in_full():
    with Engine(tiny_model(), template=PromptTemplate(prefix=[1]), method="calibrated") as engine:
        keep_result(engine.store, {"setting": "another", "chosen": "reuse", "made_with": {}})
        said = engine.advise(limit_s=0.1)
    assert (said.budget, said.method) == (1.0, repr(FullPrefill()))
    assert said.reuse_s("cpu", 256) == said.full_s(256) and said.pays_from("cpu") is None, "nothing is loaded"


@pytest.mark.parametrize(
    ("method", "least", "most"),
    [
        (LegoLink(16), 0.05, 0.07),  # of passages of about 250 tokens
        (CacheBlend(0.5), 0.7, 0.8),  # all tokens of two layers of four, half of the others'
        (Union(Reuse(), QuestionAware(0.2)), 0.2, 0.2),
        (Auto(RelevantTokens(0.3)), 0.3, 0.3),
        (Reuse(), 0, 0),
    ],
)
def test_the_budget_is_what_the_method_is_charged(method, least, most):
    with Engine(tiny_model(), template=PromptTemplate(prefix=[1]), method=method) as engine:
        assert least <= engine.advise(limit_s=0.1).budget <= most


def test_what_it_asks_of_the_engine():
    with Engine(tiny_model(), template=PromptTemplate(prefix=[1]), method=Auto()) as engine:
        said = engine.advise(limit_s=0.1)
    assert (said.budget, said.passes, said.method) == (0.1, 2, repr(Auto()))
    limit = engine.decoder.max_positions
    assert limit is None or max(said.lengths) <= said.most_tokens < limit
