"""What is in CPU memory is brought to a device one layer ahead, in a stream of its own that the work waits for."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ragkv import Engine, LegoLink, PromptTemplate, Reuse, TieredStore
from ragkv.fusion import placement, supply
from ragkv.fusion.bus import Bus
from ragkv.testing import random_ids, tiny_model

LAYERS = 4


class Streams:
    """A device's module that writes down what is given to it, on the CPU."""

    def __init__(self):
        self.log, self.now, self.events = [], "main", 0

    @contextmanager
    def stream(self, stream):
        self.now = "side"
        yield
        self.now = "main"

    def current_stream(self, device):
        return SimpleNamespace(wait_event=lambda event: self.log.append(("wait", event)))

    def record(self):
        self.events += 1
        return self.events


class Watched(Bus):
    """Torch says of no tensor of the CPU which stream uses it."""

    def _used(self, part, stream):
        self._module.log.append(("used", part.data_ptr()))


@pytest.fixture
def streams(monkeypatch):
    seen, init = Streams(), placement.Placement.__init__
    copied, placed = supply.at_room, placement.place_pieces

    def copy(tensor, room):
        out = tensor.clone()
        assert copied(tensor, room) is tensor  # of the same device
        seen.log.append((seen.now, out.data_ptr()))
        return out

    def place(pieces, impl):
        seen.log.append(("place", {part for p in pieces for part in parts(p.stored)}))
        placed(pieces, impl=impl)

    monkeypatch.setattr(placement.Placement, "__init__", lambda *args, **more: init(*args, **more, by_layer=True))
    monkeypatch.setattr(
        placement, "bus", lambda device: Watched(seen, device, SimpleNamespace(record_event=seen.record))
    )
    monkeypatch.setattr(supply, "at_room", copy)
    monkeypatch.setattr(placement, "place_pieces", place)
    return seen


def parts(stored):
    return {part.data_ptr() for part in (stored.numbers, stored.scale, stored.low) if part is not None}


@pytest.mark.parametrize("codec", [None, "int8", "fp8"])
@pytest.mark.parametrize("method", [Reuse(), LegoLink(2)], ids=["reuse", "lego-link"])
def test_one_layer_ahead(codec, method, streams):
    store = TieredStore(cpu_codec=codec)
    with Engine(tiny_model(num_hidden_layers=LAYERS), template=PromptTemplate(prefix=[1, 5]), store=store) as engine:
        chunks = engine.add([random_ids(n) for n in (20, 31)])
        streams.log.clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(placement, "bus", lambda device: None)
            want = engine.fuse(chunks[::-1], random_ids(5), method=method)
            assert {what for what, _ in streams.log} == {"main", "place"}
        streams.log.clear()
        got = engine.fuse(chunks[::-1], random_ids(5), method=method)
    assert torch.equal(got.logits, want.logits) and got.report.hits == {"cpu": 2}
    log = [(what, which) for what, which in streams.log if what != "main"]
    assert len(log) == len(streams.log)  # nothing is copied between the kernels
    places = [number for number, (what, _) in enumerate(log) if what == "place"]
    assert len(places) == LAYERS
    for layer, at in enumerate(places):
        begin = places[layer - 1] if layer else -1
        before, read = log[begin + 1 : at], log[at][1]
        assert ("wait", layer + 1) in before  # for its own copies, which came before those of the next
        waited = before.index(("wait", layer + 1))
        assert {part for what, part in before[waited:] if what == "used"} == read
        assert {part for what, part in before[:waited] if what == "side"} == read
    assert log[-1][0] == "place"


def test_what_has_to_be_read_from_disk_is_not_waited_for_ahead(streams, tmp_path):
    store = TieredStore(tmp_path, cpu_bytes=0)
    with Engine(tiny_model(num_hidden_layers=LAYERS), template=PromptTemplate(prefix=[1, 5]), store=store) as engine:
        chunks = engine.add([random_ids(20)])
        streams.log.clear()
        engine.fuse(chunks, random_ids(5), method=Reuse())
    assert {what for what, _ in streams.log} == {"main", "place"}
