"""A warm prompt is launched without waiting for the device: counted on a CPU by the mode of ``ragkv.model.syncs``."""

from dataclasses import replace

import pytest
import torch

import ragkv.fuse
from ragkv import (
    CacheBlend,
    CacheCraft,
    Engine,
    FullPrefill,
    LegoLink,
    MethodError,
    PromptTemplate,
    QuestionAware,
    Random,
    RelevantTokens,
    Reuse,
    Selection,
    SensitiveTokens,
    TieredStore,
    Union,
)
from ragkv.fusion import placement
from ragkv.fusion.layout import Layout
from ragkv.fusion.passes import Pass
from ragkv.model.syncs import no_syncs
from ragkv.testing import random_ids, tiny_model

CPU, QUESTION = torch.device("cpu"), random_ids(6)
FREE = [
    Reuse(),
    FullPrefill(),
    LegoLink(3),
    LegoLink(25),
    SensitiveTokens(0.2),
    SensitiveTokens(0.9),
    RelevantTokens(0.2),
    QuestionAware(0.2),
    QuestionAware(0.5, queries="last"),
    QuestionAware(0.2, sees=0.5),
    CacheBlend(0.3),
    CacheBlend(check_layer=2, signal="both", gradual=(0.5, 0.3)),
]
HELD_UP = {CacheBlend(threshold=1.0): 1, Union(RelevantTokens(0.1), LegoLink(2)): 4, Random(0.2): 6, CacheCraft(): 10}


@pytest.fixture(scope="module")
def engines():
    """Engines whose chunks lie in the GPU tier: with the model's own attention, and in fixed shapes."""
    made = {}
    for name, more in {"masks": {}, "fixed": {"kernels": "reference", "graphs": True}}.items():
        store = TieredStore(gpu_bytes=1 << 24, device="cpu")
        engine = Engine(tiny_model(), template=PromptTemplate(prefix=[1, 5]), store=store, method=CacheCraft(), **more)
        chunks = [engine.add([random_ids(count, count)])[0] for count in (21, 33, 40, 29)]
        engine.fuse(chunks, QUESTION)
        made[name] = engine, chunks[::-1]
    yield made
    for engine, _ in made.values():
        engine.close()


@pytest.fixture
def waits(engines, monkeypatch):
    """The waits of one warm prompt, from its layout to its logits, and the prompt."""
    init, listed = placement.Placement.__init__, Layout.listed
    monkeypatch.setattr(
        placement.Placement, "__init__", lambda *args, **more: init(*args, **{**more, "by_layer": True})
    )

    def count(name, method):
        engine, chunks = engines[name]
        engine.fuse(chunks, QUESTION, method=method)
        seen, make, compute = [], ragkv.fuse.fuse, Pass.logits
        mode = no_syncs(CPU, seen.append)

        def begun(*args, **more):
            with mode:
                return make(*args, **more)

        def computed(done):
            logits = compute(done)
            before.append(list(seen))
            return logits

        def said(layout, *slots):  # the ids once more, in the host's memory
            kept = list(seen)
            ids = listed(layout, *slots)
            seen[:] = kept
            return ids

        before = []
        with monkeypatch.context() as patched:
            patched.setattr(Layout, "listed", said)
            patched.setattr(Pass, "logits", computed)
            patched.setattr(ragkv.prompting, "fuse", begun)
            prompt = engine.fuse(chunks, QUESTION, method=method)
        return before[0], prompt

    return count


@pytest.mark.parametrize("method", FREE, ids=repr)
@pytest.mark.parametrize("name", ["masks", "fixed"])
def test_nothing_is_waited_for_before_the_logits(name, method, waits):
    sees = getattr(method, "sees", 1)
    seen, prompt = waits("masks" if sees < 1 else name, method)
    assert seen == [] and prompt.report.hits.keys() <= {"gpu", "unused"}
    assert bool(prompt.report.budget) == (method != Reuse())
    assert prompt.recomputed.diff().min() > 0


@pytest.mark.parametrize("method", HELD_UP, ids=repr)
def test_what_still_waits(method, waits):
    assert len(waits("fixed", method)[0]) == HELD_UP[method]


class Names(SensitiveTokens):
    """Vouches for what it chooses, and names a chunk that need not be loaded."""

    number = 1

    def select(self, view):
        return Selection(view.layout.span(view.layout.chunks[self.number]), whole=frozenset([self.number]))


class SaysNothing(Names):
    """The same, and leaves it to be found out."""

    def select(self, view):
        return super().select(view).tokens


@pytest.mark.parametrize("number", range(4))
def test_a_method_of_ones_own_may_vouch(number, waits, monkeypatch):
    """It waits for nothing then, and the prompt is the same."""
    monkeypatch.setattr(Names, "number", number)
    (seen, prompt), (checked, same) = waits("masks", Names()), waits("masks", SaysNothing())
    assert seen == [] and checked
    assert prompt.report.sources == same.report.sources == ["gpu"] * number + ["unused"] + ["gpu"] * (3 - number)
    assert torch.equal(prompt.logits, same.logits) and torch.equal(prompt.recomputed, same.recomputed)


@pytest.mark.parametrize(("whole", "kept"), [({0}, 28), ({1, 3}, 50), ({4}, 123), (set(), 124)])
def test_what_cannot_be_vouched_for_is_refused(engines, whole, kept):
    """A chunk that is not chosen whole would not be loaded, and what is read in its place nobody wrote."""

    class Claims(FullPrefill):
        def select(self, view):
            tokens = view.layout.reusable[torch.arange(kept) % 123]
            return replace(super().select(view), tokens=tokens, whole=frozenset(whole))

    engine, chunks = engines["masks"]
    with pytest.raises(MethodError, match="whole=None"):
        engine.fuse(chunks, QUESTION, method=Claims())


class Last:
    """Narrows what another selects."""

    def narrow(self, check):
        return check.tokens[-2:]


class Hands(Reuse):
    """Vouches for all, and hands on to what is no method."""

    def select(self, view):
        return Selection(view.layout.reusable, checks=[2], method=Last(), whole=frozenset())


def test_who_narrows_need_be_no_method(engines):
    engine, chunks = engines["masks"]
    assert engine.fuse(chunks, QUESTION, method=Hands()).report.fresh_by_layer == [123, 123, 123, 2]


class Strays(CacheBlend):
    """Its selection is vouched for by another class than what it narrows to."""

    def narrow(self, check):
        return check.tokens[:1] * 0


def test_what_a_subclass_narrows_to_is_checked(engines):
    engine, chunks = engines["masks"]
    with pytest.raises(MethodError, match="not open to it"):
        engine.fuse(chunks, QUESTION, method=Strays(0.3, check_layer=2))
