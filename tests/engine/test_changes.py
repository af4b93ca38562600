"""Chunks that vanish or prove damaged while a prompt is put together, and who waits for whom."""

import copy
import threading

import pytest
import torch

from ragkv import (
    CacheBlend,
    Chunk,
    Engine,
    FullPrefill,
    LegoLink,
    Method,
    ModelChangedError,
    PromptError,
    Random,
    RecordError,
    Reuse,
    TieredStore,
)
from ragkv.fusing import Fusing
from ragkv.fusion.placement import Placement
from ragkv.store import Batch
from ragkv.testing import random_ids

from .conftest import QUESTION, TEMPLATE

TIERS = {"memory": {"cpu_bytes": 1 << 26}, "disk": {"cpu_bytes": 0}, "both": {"cpu_bytes": 1 << 26}}


@pytest.fixture(params=TIERS)
def stored(request, shared_model, tmp_path):
    path = None if request.param == "memory" else tmp_path / "kv"
    with Engine(shared_model, template=TEMPLATE, store=TieredStore(path, **TIERS[request.param])) as engine:
        yield engine


def test_a_chunk_forgotten_once_the_batch_is_open_is_placed_all_the_same(stored, monkeypatch):
    """What a batch holds stays readable, and nobody looks a second time."""
    chunks = stored.add([random_ids(n) for n in (20, 31, 9)])
    for method in (Reuse(), LegoLink(4), CacheBlend(0.3, check_layer=2)):
        stored.documents.add(chunks)
        want = stored.fuse(chunks[::-1], QUESTION, method=method)
        lost = Fusing._lost

        def and_forgets(*args, lost=lost):
            found = lost(*args)
            assert stored.forget(chunks) == 3
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Fusing, "_lost", and_forgets)
            got = stored.fuse(chunks[::-1], QUESTION, method=method)
        assert torch.equal(got.logits, want.logits)
        assert "computed" not in got.report.hits
        assert stored.documents.missing(chunks) == chunks  # and it did not come back


def damaging(monkeypatch, engine, chunks):
    """These chunks' records prove damaged when they are read, each once."""
    bad = {engine.documents.key(chunk) for chunk in chunks}
    layer, direct = Batch.layer, Batch.direct

    def read(self, index, number):
        key = self.keys[index]
        if key in bad:
            bad.discard(key)
            engine.store.remove(key)
            raise RecordError(f"the record {key.hex()} is damaged and was dropped")
        return layer(self, index, number)

    monkeypatch.setattr(Batch, "layer", read)
    monkeypatch.setattr(Batch, "direct", lambda self, index: self.keys[index] not in bad and direct(self, index))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_damaged_records_is_read_again(stored, monkeypatch, count):
    chunks = stored.add([random_ids(n) for n in (20, 31, 9, 14)])
    want = stored.fuse(chunks[::-1], QUESTION, method=Reuse())
    damaging(monkeypatch, stored, chunks[:count])
    got = stored.fuse(chunks[::-1], QUESTION, method=Reuse())
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    assert not stored.documents.missing(chunks)


def test_a_record_that_cannot_be_dropped_raises(engine, monkeypatch):
    chunks = engine.add([random_ids(20), random_ids(31), random_ids(9)])
    tries = []

    def damaged(self, index, number):
        tries.append(index)
        raise RecordError("damaged")

    monkeypatch.setattr(Batch, "layer", damaged)
    with pytest.raises(RecordError):
        engine.fuse(chunks, QUESTION, method=Reuse())
    assert len(tries) == 2  # nothing was gained, so nothing is tried a third time


def test_equal_chunks_are_all_placed(engine, monkeypatch):
    """Two objects of one content, in one prompt: each has a place of its own."""
    one, other = engine.add_document([random_ids(20), random_ids(31)])
    want = engine.fuse([other, one, other], QUESTION, method=Reuse())
    twin = Chunk.from_dict(other.to_dict())
    cache = engine.decoder.cache

    def poisoned(capacity):
        made = cache(capacity)
        for layer in made.layers:
            layer.key_room.fill_(float("nan"))
            layer.value_room.fill_(float("nan"))
        return made

    monkeypatch.setattr(engine.decoder, "cache", poisoned)
    got = engine.fuse([twin, one, other], QUESTION, method=Reuse())
    torch.testing.assert_close(got.logits, want.logits)


def test_a_chunk_of_another_place_is_refused(engine):
    chunk = engine.add_document([random_ids(20), random_ids(31)])[1]
    for wrong in ({"offset": 200}, {"ids": [4, 500]}):
        with pytest.raises(PromptError):
            engine.fuse([Chunk.from_dict({**chunk.to_dict(), **wrong})], QUESTION)
    assert engine.documents.missing([chunk]) == []


def test_a_model_that_changes_behind_its_prompt_is_not_decoded_with(shared_model):
    model = copy.deepcopy(shared_model)
    engine = Engine(model, template=TEMPLATE, method=Reuse())
    chunks = engine.add([random_ids(20)])

    class Writes:
        def __call__(self, ids, scores):
            with torch.no_grad():
                model.model.layers[1].self_attn.v_proj.weight.mul_(-1)
            return scores

    with pytest.raises(ModelChangedError):
        engine.generate(chunks, QUESTION, max_new_tokens=4, logits_processor=[Writes()])
    assert engine.documents.add(chunks) == len(chunks[0]), "read anew with the model as it is now"


def test_what_the_layout_decides_opens_nothing(engine, monkeypatch):
    """A method that computes everything, or asks the layout alone, neither reads nor places to make up its mind."""
    chunks = engine.add([random_ids(20), random_ids(31)])
    opened, placed = [], []
    read, upto = engine.store.read, Placement.upto
    monkeypatch.setattr(engine.store, "read", lambda *args, **more: opened.append(args) or read(*args, **more))
    monkeypatch.setattr(Placement, "upto", lambda self, *args: placed.append(args) or upto(self, *args))

    class Chooses(Method):
        def __init__(self, method):
            self.method = method

        def select(self, view):
            chosen = self.method.select(view)
            assert not opened and not placed
            return chosen

    engine.fuse(chunks, QUESTION, method=Chooses(FullPrefill()))
    assert not opened and not placed
    for method in (Reuse(), LegoLink(3), Random(0.2)):
        engine.fuse(chunks[::-1], QUESTION, method=Chooses(method))
        assert len(opened) == 1 and placed
        opened.clear(), placed.clear()
    engine.fuse(chunks[::-1], QUESTION, method=CacheBlend(0.2, check_layer=3))
    assert placed == [(3, 3)]  # the layers in front of the check are computed whole


def test_placing_waits_for_no_model_and_the_model_for_no_placing(engine, monkeypatch):
    """While one prompt's chunks come from a disk that hangs, another is answered."""
    slow, fast = engine.add([random_ids(20)]), engine.add([random_ids(31)])
    engine.fuse(fast, QUESTION)
    hangs, go_on = threading.Event(), threading.Event()
    layer, key = Batch.layer, engine.documents.key(slow[0])

    def hanging(self, index, number):
        if self.keys[index] == key:
            hangs.set()
            assert go_on.wait(30)
        return layer(self, index, number)

    monkeypatch.setattr(Batch, "layer", hanging)
    first = threading.Thread(target=engine.fuse, args=(slow, QUESTION), daemon=True)
    first.start()
    assert hangs.wait(30)
    second = threading.Thread(target=engine.fuse, args=(fast, QUESTION), daemon=True)
    second.start()
    second.join(30)
    answered = not second.is_alive()
    go_on.set()
    first.join(30)
    second.join(30)
    assert answered


def test_a_layer_is_placed_once(engine, monkeypatch):
    """However often it is asked for, on an accelerator before its layer attends: by a look, then by the pass."""
    init, order = Placement.__init__, []
    monkeypatch.setattr(Placement, "__init__", lambda *args, **more: init(*args, **more, by_layer=True))
    place = Placement._place_layer
    monkeypatch.setattr(Placement, "_place_layer", lambda self, n: (order.append(f"place {n}"), place(self, n)))
    chunks = engine.add([random_ids(20), random_ids(31)])[::-1]
    for number, layer in enumerate(engine.decoder.layers):
        layer.self_attn.register_forward_hook(lambda *_, n=number: order.append(f"run {n}"))
    try:
        engine.fuse(chunks, QUESTION, method=LegoLink(2))
        assert order == [f"{what} {n}" for n in range(4) for what in ("place", "run")]
        order.clear()

        class Looks(Method):
            def select(self, view):
                view.attention("last")
                return view.deviation.mean(0).topk(3).indices + view.layout.chunks_start

        engine.fuse(chunks, QUESTION, method=Looks())
        assert [name for name in order if name[0] == "p"] == [f"place {n}" for n in range(4)]
    finally:
        for layer in engine.decoder.layers:
            layer.self_attn._forward_hooks.clear()


def test_a_batch_is_done_with_chunk_by_chunk(engine, monkeypatch):
    """So that besides the prompt no more than one chunk is in memory; one that stands twice, behind its last place."""
    one, two = engine.add([random_ids(20), random_ids(31)])
    events, layer, done = [], Batch.layer, Batch.done
    monkeypatch.setattr(Batch, "layer", lambda self, i, n: (events.append(f"read {i}"), layer(self, i, n))[1])
    monkeypatch.setattr(Batch, "done", lambda self, i: (events.append(f"done {i}"), done(self, i)))
    engine.fuse([two, one, two], QUESTION, method=Reuse())
    order = [name for number, name in enumerate(events) if not number or events[number - 1] != name]
    assert order == ["read 0", "read 1", "done 1", "read 0", "done 0"]
