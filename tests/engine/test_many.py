"""Several questions side by side: each answer is what it would be alone."""

import threading
import time
from dataclasses import dataclass

import pytest
import torch

from ragkv import (
    RAG,
    ArgumentError,
    DocumentError,
    Engine,
    LegoLink,
    PromptError,
    PromptTemplate,
    QuestionAware,
    StoreError,
)
from ragkv.fusion.passes import Pass
from ragkv.model import steps
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10], before_question=[11], after_question=[12, 13])
NO_END = {"max_new_tokens": 6, "eos_token_id": None}


@pytest.fixture
def engine():
    return Engine(tiny_model(), template=TEMPLATE, method=LegoLink(4))


def test_generate_many_is_generate_for_each(engine):
    chunks = engine.add([random_ids(n) for n in (17, 20, 31)])
    asked = [([chunks[n % 3], chunks[(n + 1) % 3]], random_ids(5 + n)) for n in range(7)]
    want = [engine.generate(*one, **NO_END).token_ids for one in asked]
    got = engine.generate_many(asked, at_once=3, **NO_END)
    assert [answer.token_ids for answer in got] == want
    assert got[0].report.new_tokens == 6
    assert engine.generate_many([]) == []


def test_the_first_that_fails_ends_all(engine):
    chunks, seen = engine.add([random_ids(17)]), []

    def count(ids, scores):
        seen.append(1)
        return scores

    asked = [(chunks, random_ids(5)), (chunks, [])] + [(chunks, random_ids(6))] * 40
    with pytest.raises(PromptError, match="question"):
        engine.generate_many(asked, at_once=2, max_new_tokens=200, eos_token_id=None, logits_processor=[count])
    assert len(seen) < 40 * 200
    with pytest.raises(ArgumentError, match="at_once"):
        engine.generate_many(asked, at_once=0)


@pytest.mark.parametrize(
    ("method", "forwards"),
    [
        ("lego-link:k=4", 1),
        ("reuse", 1),
        ("full-prefill", 1),
        ("cache-blend:ratio=0.3", None),  # its passes narrow with depth, each alone
        ("question-aware:ratio=0.2", 2),  # the look, and what it chose
    ],
)
def test_fuse_many_is_fuse_for_each(engine, method, forwards):
    chunks = engine.add([random_ids(n) for n in (17, 20, 31)])
    asked = [([chunks[n % 3], chunks[(n + 1) % 3]], random_ids(5 + n)) for n in range(4)]
    want = [engine.fuse(*one, method=method) for one in asked]
    steps = engine.runner.steps()
    before = steps.sizes.total()
    got = engine.fuse_many(asked, method=method)
    assert forwards is None or steps.sizes.total() == before + forwards
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4)
        assert (a.report.budget, a.report.hits) == (b.report.budget, b.report.hits)
        for layer, other in zip(a.past_key_values.layers, b.past_key_values.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=1e-4)
    assert engine.fuse_many([]) == [] and engine.scheduler.stats().running == 0


def test_a_look_that_failed_beside_others_is_taken_anew(engine, monkeypatch):
    chunks, method = engine.add([random_ids(n) for n in (17, 20, 31)]), QuestionAware(0.2)
    asked = [(chunks, random_ids(n)) for n in (5, 6, 7)]
    want = [engine.fuse(*one, method=method) for one in asked]
    real, failed = steps.run_packed, []

    def fails_once(*args):
        logits = real(*args)
        if not failed:
            failed.append(1)
            raise RuntimeError("somebody's rows were wrong")
        return logits

    monkeypatch.setattr(steps, "run_packed", fails_once)
    for a, b in zip(engine.fuse_many(asked, method=method), want, strict=True):
        torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4)
    assert failed


@dataclass(frozen=True)
class Differs(QuestionAware):
    """Looks at a long question only."""

    def select(self, view):
        layout = view.layout
        return super().select(view) if len(layout.suffix) > 10 else layout.reusable[:5]


def test_who_looks_waits_for_nobody_who_does_not(engine):
    chunks = engine.add([random_ids(n) for n in (17, 20, 31)])
    asked = [(chunks, random_ids(n)) for n in (4, 4, 20, 21)]
    want = [engine.fuse(*one, method=Differs()) for one in asked]
    made = engine.runner.steps()
    before = made.sizes.copy()
    got = engine.fuse_many(asked, method=Differs())
    # Two prompts and two looks; then what these chose.
    assert made.sizes - before == {4: 1, 2: 1}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4)


def test_the_first_pass_waits_for_whoever_comes_late(engine, monkeypatch):
    chunks, real, here = engine.add([random_ids(17)]), Pass.logits, threading.Barrier(3)

    def late(done):
        time.sleep(0.05 * here.wait(30))
        return real(done)

    asked, steps = [(chunks, random_ids(5 + n)) for n in range(3)], engine.runner.steps()
    assert steps.packs
    before = steps.sizes.total()
    monkeypatch.setattr(Pass, "logits", late)
    engine.fuse_many(asked)
    assert steps.sizes.total() == before + 1 and not steps._seats


@pytest.mark.parametrize("failing", [0, 2])
def test_one_that_fails_keeps_nobody_waiting(engine, failing):
    chunks = engine.add([random_ids(17)])
    asked = [(chunks, random_ids(5)) for _ in range(3)]
    asked[failing] = ([*chunks, random_ids(8)], random_ids(5))
    real = engine.documents.read

    def read(*args, **options):
        raise StoreError("the disk is gone")

    engine.documents.read = read
    with pytest.raises(StoreError, match="the disk is gone"):
        engine.fuse_many(asked)
    engine.documents.read = real
    assert len(engine.fuse_many(asked)) == 3
    for ask in (engine.fuse_many, engine.generate_many):
        for wrong, why in (
            ("abc", "requests must be a list"),
            ([chunks], r"must be \(chunks, question\)"),
            ([5], "must be"),
        ):
            with pytest.raises(PromptError, match=why):
                ask(wrong)


def test_threads_that_cannot_be_made_keep_nobody_waiting(engine, monkeypatch):
    chunks, real, made = engine.add([random_ids(17)]), threading.Thread.start, []

    def start(thread):
        made.append(thread)
        if len(made) == 3:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="new thread"):
        engine.fuse_many([(chunks, random_ids(5)) for _ in range(4)])
    assert engine.scheduler.stats().running == 0


def test_ask_many_gives_each_its_sources(tmp_path):
    with RAG.from_pretrained(path=tmp_path / "kv") as rag:
        rag.add_texts(["Ormas Norwell leads the mill.", "The bridge of Glenfield is red."], ["mill", "bridge"])
        questions = ["Who leads the mill?", "What colour is the bridge?", "Who is Ormas Norwell?"]
        want = [rag.ask(question, top_k=1, max_new_tokens=5) for question in questions]
        got = rag.ask_many(questions, top_k=1, max_new_tokens=5)
        assert [answer.text for answer in got] == [answer.text for answer in want]
        assert [[hit.source for hit in answer.sources] for answer in got] == [
            [hit.source for hit in answer.sources] for answer in want
        ]
        with pytest.raises(DocumentError, match="must be a list"):
            rag.ask_many("a question?")
