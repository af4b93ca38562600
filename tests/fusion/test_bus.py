"""What is in CPU memory is brought to a device a few layers ahead, in a stream of its own that the work waits for.

That stream is a queue here: nothing in it is done before somebody waits for it, and as late as that allows.
"""

from types import SimpleNamespace

import pytest
import torch

from ragkv import CacheBlend, Engine, LegoLink, PromptTemplate, RelevantTokens, Reuse, TieredStore
from ragkv.fusion import convoy, placement
from ragkv.fusion.bus import Bus
from ragkv.fusion.convoy import Convoy, Freight
from ragkv.kernels import Layers, Run
from ragkv.testing import random_ids, tiny_model

LAYERS = 9
TEMPLATE = PromptTemplate(prefix=[1, 5])


class Late(Bus):
    """Does what it is given when it is waited for; what it copies to is rubbish until then, and again when it may be written to."""

    def __init__(self):
        self.log, self.queue, self.placed, self.frees = [], [], 0, []

    def room(self, *size):
        self.ring = torch.full(size, 0xFF, dtype=torch.uint8)
        return self.ring

    def send(self, load, free=None):
        number = len([what for what in self.log if what == "send"])
        self.log.append("send")
        self.frees.append(free)

        def run():
            assert free is None or free <= self.placed  # nobody reads any more what is written over
            self.ring[number % len(self.ring)] = 0xFF
            load()
            self.log.append(f"brought {number}")

        self.queue.append(run)

        def arrived():
            while run in self.queue:
                self.queue.pop(0)()

        return arrived

    def mark(self):
        self.placed += 1
        self.log.append(f"placed {self.placed - 1}")
        return self.placed


@pytest.fixture
def late(monkeypatch):
    """Placing as on an accelerator, whose bus this is."""
    buses, init = [], placement.Placement.__init__
    monkeypatch.setattr(placement.Placement, "__init__", lambda *args, **more: init(*args, **more, by_layer=True))
    monkeypatch.setattr(placement, "bus", lambda device: buses.append(Late()) or buses[-1])
    return buses


def made(model=None, **store):
    return Engine(model or tiny_model(num_hidden_layers=LAYERS), template=TEMPLATE, store=TieredStore(**store))


METHODS = [Reuse(), LegoLink(2), RelevantTokens(0.2), CacheBlend(0.3)]


@pytest.mark.parametrize("codec", [None, "int8", "int4", "fp8", "lossless"])
@pytest.mark.parametrize("method", METHODS, ids=["reuse", "lego-link", "relevant", "cache-blend"])
def test_the_prompt_is_the_same(codec, method, late):
    """Also where a chunk stands in it twice, or where it was made."""
    with made(cpu_codec=codec) as engine:
        chunks = engine.add([random_ids(n) for n in (20, 31, 33)])
        asked = [chunks[0], chunks[2], chunks[1], chunks[2]]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(placement, "bus", lambda device: None)
            want = engine.fuse(asked, random_ids(5), method=method)
        got = engine.fuse(asked, random_ids(5), method=method)
        assert got.report.hits == {"cpu": 4}
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)
    for a, b in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)
    assert (late[-1].log != []) == (codec != "lossless")  # which the host decodes


def test_groups_are_ahead_of_the_work(late):
    """Three are on their way; the fourth comes where the first one stood, once that is placed."""
    with made() as engine:
        chunks, log = engine.add([random_ids(20), random_ids(31)]), []
        for number, layer in enumerate(engine.model.model.layers):
            layer.self_attn.o_proj.register_forward_hook(lambda *_, number=number: log.append(f"layer {number}"))
        late.clear()
        placement_bus = Late()
        placement_bus.log = log
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(placement, "bus", lambda device: placement_bus)
            patched.setattr(convoy, "_AHEAD", 2)
            log.clear()
            engine.fuse(chunks[::-1], random_ids(5), method=Reuse())
    assert log == [
        *("send", "send", "brought 0", "placed 0", "send", *(f"layer {number}" for number in range(4))),
        *("brought 1", "placed 1", *(f"layer {number}" for number in range(4, 8)), "brought 2", "placed 2", "layer 8"),
    ]


def test_a_group_waits_for_the_one_whose_place_it_takes(late, monkeypatch):
    monkeypatch.setattr(convoy, "GROUP", 1)
    with made() as engine:
        engine.fuse(engine.add([random_ids(20)]), random_ids(5), method=Reuse())
    assert late[-1].frees == [None, None, None, *range(1, LAYERS - 2)]


def test_what_lies_elsewhere_is_no_freight():
    """A part that had to be copied to be read, and one whose numbers do not follow each other."""
    data = torch.zeros(4 * 64, dtype=torch.uint8)
    numbers = data.view(torch.float32).view(2, 4, 8)
    assert Freight.of(data, [(0, 256)], Layers.raw([(numbers[:1], numbers[1:])])) is not None
    for other in (numbers[1:].clone(), numbers[1:, :, ::2].repeat_interleave(2, 2), numbers.transpose(0, 1)[:1, :4]):
        pair = (other, other)
        assert Freight.of(data, [(0, 256)], Layers.raw([pair])) is None


@pytest.mark.parametrize("begin", [0, 4, 8, 20])
def test_what_is_brought_keeps_its_alignment(begin):
    """Kernels read 16 bytes at a time where a chunk's own memory allows it."""
    freight = {}
    for name, tokens in (("a", 3), ("b", 5)):
        data = torch.zeros(begin + 4 * 2 * tokens * 8, dtype=torch.uint8)
        spans = [(begin + layer * 8 * tokens * 2, begin + (layer + 1) * 8 * tokens * 2) for layer in range(4)]
        pairs = [
            tuple(
                data[a + half * 8 * tokens : a + (half + 1) * 8 * tokens].view(torch.float32).view(1, tokens, 2)
                for half in (0, 1)
            )
            for a, _ in spans
        ]
        freight[name.encode()] = Freight.of(data, spans, Layers.raw(pairs))
    cache = SimpleNamespace(layers=range(4))
    runs = [(key, Run(held.layers, 0, held.layers.tokens)) for key, held in freight.items()]
    made = Convoy(Late(), torch.device("cpu"), freight, runs, cache, range(4), "reference")
    assert all(shift % 16 == 0 for run in made._runs for shift in run.source.shifts)


@pytest.mark.parametrize("first", [0, 1, 5])
def test_layers_in_front_are_left_alone(first, late):
    """A method that computes all tokens of the first layers needs nothing placed there."""
    with made() as engine:
        chunks = engine.add([random_ids(20), random_ids(31)])
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(placement, "bus", lambda device: None)
            want = engine.fuse(chunks[::-1], random_ids(5), method=CacheBlend(0.3, check_layer=first or 1))
        got = engine.fuse(chunks[::-1], random_ids(5), method=CacheBlend(0.3, check_layer=first or 1))
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)


def test_what_has_to_be_read_from_disk_comes_layer_by_layer(late, tmp_path):
    with made(path=tmp_path, cpu_bytes=0) as engine:
        chunks = engine.add([random_ids(20)])
        engine.fuse(chunks, random_ids(5), method=Reuse())
    assert late and not any(bus.log for bus in late)


class Stream:
    """Writes down what it is given."""

    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0

    def record_event(self):
        self.events += 1
        self.log.append(f"{self.name} records {self.events}")
        return f"{self.name} {self.events}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


def test_streams_wait_for_each_other():
    """The stream that is the current one by then waits for what is brought, whose memory lives as long as that reads it."""
    log = []
    side, main, now = Stream("side", log), Stream("main", log), []

    class Module:
        @staticmethod
        def stream(stream):
            return torch.autograd.profiler.record_function(stream.name)

        @staticmethod
        def current_stream(device):
            return main

    class Noted(Bus):
        def _used(self, tensor, stream):
            now.append((tensor, stream.name))

    bus, memory = Noted(Module, torch.device("cpu"), side), torch.zeros(2)
    arrived = bus.send(lambda: log.append("load") or [memory], free=bus.mark())
    assert log == ["main records 1", "side waits for main 1", "load", "side records 1"] and not now
    arrived()
    assert log[-1] == "main waits for side 1"
    assert [(tensor is memory, name) for tensor, name in now] == [(True, "main")]
    assert bus.room(2, 8).shape == (2, 8)
