"""The engine on Triton kernels: the same prompts as on their reference."""

import pytest
import torch

from ragkv import CacheBlend, Engine, LegoLink, PromptTemplate, QuestionAware, Reuse, TieredStore
from ragkv.fusion import placement
from ragkv.fusion.bus import Bus
from ragkv.kernels.triton_impl import place as launching
from ragkv.kernels.triton_impl import place_layers
from ragkv.testing import random_ids, tiny_model


@pytest.mark.parametrize("architecture", ["llama", "glm"])  # halves; interleaved pairs of a part of each head
def test_prompts_are_those_of_the_reference(device, architecture):
    model = tiny_model(architecture, num_hidden_layers=2).to(device)
    template = PromptTemplate(prefix=[1, 5])
    passages, question = [random_ids(n) for n in (9, 14)], random_ids(3)
    engines = [Engine(model, template=template, kernels=kernels) for kernels in ("reference", "triton")]
    methods = (LegoLink(2), CacheBlend(0.3)) if architecture == "glm" else (Reuse(), QuestionAware(0.3))
    for method in methods:
        want, got = (e.fuse(e.add(passages)[::-1], question, method=method) for e in engines)
        assert (want.report.kernels, got.report.kernels) == ("reference", "triton")
        if method != Reuse():
            assert got.report.attention == "selective (triton)"
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)


def test_one_pass_for_several_prompts(device, monkeypatch):
    """As on a GPU: each prompt is placed from the pool's blocks, and one pass computes what all of them need."""
    plain = placement.Placement.__init__
    model = tiny_model("gpt_oss", num_hidden_layers=2).to(device)  # windows and sinks
    store = TieredStore(gpu_bytes=1 << 20, device=device)
    template, method = PromptTemplate(prefix=[1, 5]), LegoLink(2)
    alone = Engine(model, template=template, kernels="reference", method=method)
    engine = Engine(model, template=template, kernels="triton", store=store, method=method)
    chunks = engine.add([random_ids(n) for n in (19, 14)])
    engine.fuse(chunks, random_ids(3))  # after its first use a chunk is in the pool
    asked = [(chunks[::-1], random_ids(3)), (chunks[:1], random_ids(5))]
    want = [alone.fuse(*one) for one in asked]
    monkeypatch.setattr(placement.Placement, "__init__", lambda *args, **more: plain(*args, **more, by_layer=True))
    steps = engine.runner.steps("triton")
    assert steps.packs
    got = engine.fuse_many(asked)
    assert steps.sizes[2] == 1
    for a, b in zip(got, want, strict=True):
        assert (a.report.attention, {*a.report.hits}) == ("selective (triton)", {"gpu"})
        torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4)
        for layer, other in zip(a.past_key_values.layers, b.past_key_values.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.values, other.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "cohere2"])  # cohere2: windows, and a layer whose keys do not turn
def test_from_the_pool_at_once(device, monkeypatch, architecture):
    """As on a GPU: chunks lie in blocks of the pool, and all layers of all of them are one launch."""
    init, launched, launch = placement.Placement.__init__, [], launching.launch_kind
    monkeypatch.setattr(placement.Placement, "__init__", lambda *args, **more: init(*args, **more, by_layer=True))
    monkeypatch.setattr(place_layers, "launch_kind", lambda *args: (launched.append(len(args[1])), launch(*args)))
    model = tiny_model(architecture, num_hidden_layers=4).to(device)
    store = TieredStore(gpu_bytes=1 << 20, device=device)
    template, passages = PromptTemplate(prefix=[1, 5]), [random_ids(n) for n in (19, 14)]
    plain = Engine(model, template=template, kernels="reference")
    engines = plain, Engine(model, template=template, kernels="triton", store=store)
    for _ in range(2):  # after its first use a chunk is in the pool
        launched.clear()
        want, got = (e.fuse(e.add(passages)[::-1], random_ids(3), method=Reuse()) for e in engines)
    # K and V of 4 layers: of the prefix; and of two runs, one chunk where it was made and one that turns
    assert got.report.hits == {"gpu": 2} and launched == [8, 16]
    for a, b in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)


class AtOnce(Bus):
    """A bus without streams."""

    def __init__(self):
        pass

    def room(self, *size):
        return torch.full(size, 0xFF, dtype=torch.uint8)

    def send(self, load, free=None):
        load()
        return lambda: None

    def mark(self):
        return None


@pytest.mark.parametrize("codec", [None, "int4"])
def test_from_cpu_memory_by_groups_of_layers(device, monkeypatch, codec):
    """As on a GPU: what comes over the bus is placed by a launch for all that is of a kind, a few layers at a time."""
    init, launched, launch = placement.Placement.__init__, [], launching.launch_kind
    model = tiny_model("cohere2", num_hidden_layers=6).to(device)  # windows, and layers whose keys do not turn
    with Engine(
        model, template=PromptTemplate(prefix=[1, 5]), kernels="triton", store=TieredStore(cpu_codec=codec)
    ) as engine:
        chunks = engine.add([random_ids(n) for n in (19, 14, 33)])
        asked = [chunks[2], chunks[0], chunks[1], chunks[0]]
        with monkeypatch.context() as patched:
            patched.setattr(placement, "bus", lambda device: None)
            want = engine.fuse(asked, random_ids(3), method=Reuse())
        monkeypatch.setattr(placement.Placement, "__init__", lambda *args, **more: init(*args, **more, by_layer=True))
        monkeypatch.setattr(place_layers, "launch_kind", lambda *args: (launched.append(len(args[1])), launch(*args)))
        if device.type == "cpu":
            monkeypatch.setattr(placement, "bus", lambda device: AtOnce())
        got = engine.fuse(asked, random_ids(3), method=Reuse())
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    assert launched and sum(launched) >= 2 * 6 * 4  # K and V of all layers of four chunks
    for layer, other in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values, other.values, atol=1e-4, rtol=1e-4)
