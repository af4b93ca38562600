"""What a warm prompt takes of the host: nothing that grows with layers times chunks, nor with tokens one by one."""

import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ragkv import Engine, LegoLink, PromptTemplate, Reuse, TieredStore, chunk
from ragkv.chunk import Chunk, digest
from ragkv.fusion import placement
from ragkv.fusion.bus import Bus
from ragkv.fusion.layout import lay_out
from ragkv.kernels import api
from ragkv.model.cache import cache_argument
from ragkv.testing import SMALL, random_ids, tiny_model

VIEWS = {"select", "slice", "unsqueeze", "view", "detach", "split", "lift_fresh", "empty", "_reshape_alias"}


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given to do: no views, and no memory."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name().removeprefix("aten::").partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class Hashes:
    """In the place of blake2b: counts bytes."""

    seen = 0

    def __init__(self, **more):
        self._hasher = blake2b(**more)

    def update(self, data):
        Hashes.seen += len(data)
        self._hasher.update(data)

    def digest(self):
        return self._hasher.digest()


@pytest.fixture(scope="module")
def engines():
    """Engines of so many layers, and so many chunks that lie in the GPU tier."""
    made = {}
    for layers, count in ((2, 12), (5, 12), (2, 24)):
        store = TieredStore(gpu_bytes=1 << 24, device="cpu")
        model = tiny_model(num_hidden_layers=layers)
        engine = Engine(model, template=PromptTemplate(prefix=[1, 5]), store=store, method=Reuse())
        chunks = engine.add([random_ids(8, number) for number in range(count)])
        engine.fuse(chunks, random_ids(3))
        made[layers, count] = engine, chunks
    yield made
    for engine, _ in made.values():
        engine.close()


@pytest.fixture
def warm(engines, monkeypatch):
    """A warm prompt, neither placed nor computed: what a GPU is given to do until then, and bytes that are hashed."""
    init = placement.Placement.__init__

    def run(layers, count, method):
        engine, chunks = engines[layers, count]
        logits, runs, Hashes.seen = torch.zeros(1, 1, SMALL["vocab_size"]), [], 0
        with monkeypatch.context() as patched, Launches() as launches:
            patched.setattr(placement.Placement, "__init__", lambda *args, **more: init(*args, **more, by_layer=True))
            patched.setattr(placement, "place_layers", lambda out, some, **more: runs.append(len(some)))
            patched.setattr(engine.model, "forward", lambda **given: SimpleNamespace(logits=logits))
            patched.setattr(chunk, "blake2b", Hashes)
            prompt = engine.fuse(chunks, random_ids(3), method=method)
        assert prompt.report.hits == {"gpu": count} and runs == [
            3
        ]  # what stands in front, the chunk that stays, and the others
        return {name: count for name, count in launches.seen.items() if name not in VIEWS}, Hashes.seen

    return run


@pytest.mark.parametrize("method", [Reuse(), LegoLink(2)], ids=["reuse", "lego-link"])
def test_neither_layers_nor_chunks_are_taken_one_by_one(method, warm):
    launched, hashed = warm(2, 12, method)
    assert (launched, hashed) == warm(5, 12, method) == warm(2, 24, method)
    assert sum(launched.values()) < 70 and hashed < 1000


class Copies(Bus):
    """A bus that counts, and does nothing."""

    def __init__(self):
        self.copies, self.places = 0, 0

    def room(self, *size):
        return torch.empty(size, dtype=torch.uint8)

    def send(self, load, free=None):
        with Launches() as launches:
            load()
        assert {name for name in launches.seen if name not in VIEWS} == {"copy_"}
        self.copies += launches.seen["copy_"]
        return lambda: None

    def mark(self):
        self.places += 1


@pytest.mark.parametrize("codec", [None, "int8"])
@pytest.mark.parametrize(("layers", "count"), [(4, 5), (8, 5), (8, 10), (9, 5)])
def test_what_is_in_cpu_memory_is_a_copy_a_chunk_for_four_layers(layers, count, codec, monkeypatch):
    """Whatever it consists of; and nothing of it is placed piece by piece."""
    init, bus = placement.Placement.__init__, Copies()
    monkeypatch.setattr(placement.Placement, "__init__", lambda *args, **more: init(*args, **more, by_layer=True))
    monkeypatch.setattr(placement, "bus", lambda device: bus)
    monkeypatch.setattr(placement, "place_pieces", lambda pieces, impl: pytest.fail("piece by piece"))
    model, store = tiny_model(num_hidden_layers=layers), TieredStore(cpu_codec=codec)
    with Engine(model, template=PromptTemplate(prefix=[1, 5]), store=store, method=Reuse()) as engine:
        chunks = engine.add([random_ids(8, number) for number in range(count)])
        engine.fuse([*chunks, chunks[0]], random_ids(3))  # the first one twice
    groups = -(-layers // 4)
    assert (bus.copies, bus.places) == (groups * count, groups)


class Nothing(Bus):
    """A bus that brings nothing."""

    def __init__(self):
        pass

    def room(self, *size):
        return torch.empty(size, dtype=torch.uint8)

    def send(self, load, free=None):
        return lambda: None

    def mark(self):
        return None


@contextmanager
def calls():
    """A block in which calls of Python's functions are counted."""
    seen, before = Counter(), sys.getprofile()
    sys.setprofile(lambda frame, event, argument: seen.update([event]))
    try:
        yield seen
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize("codec", [None, "int8"])
def test_what_is_brought_is_not_taken_layer_by_layer_of_each_chunk(codec, monkeypatch):
    """A chunk is a few calls of Python, however many layers there are, and none of torch; what is of a kind shares a launch."""
    place, init = pytest.importorskip("ragkv.kernels.triton_impl.place"), placement.Placement.__init__
    monkeypatch.setattr(placement.Placement, "__init__", lambda *args, **more: init(*args, **more, by_layer=True))
    monkeypatch.setattr(placement, "bus", lambda device: Nothing())
    launched, called, ran = [], {}, {}
    for layers, count in product((8, 24), (5, 10)):
        model, store = tiny_model(num_hidden_layers=layers), TieredStore(cpu_codec=codec)
        out, named = SimpleNamespace(logits=torch.zeros(1, 1, SMALL["vocab_size"])), cache_argument(type(model).forward)

        def forward(*, layers=layers, out=out, named=named, **given):
            given[named].before(layers - 1)
            return out

        with Engine(model, template=PromptTemplate(prefix=[1, 5]), store=store, method=Reuse()) as engine:
            chunks = engine.add([random_ids(64, number) for number in range(count)])
            ask = partial(engine.fuse, [*chunks[::-1], chunks[0]], random_ids(3))
            with monkeypatch.context() as patched:
                patched.setattr(model, "forward", forward)
                patched.setattr(api, "implementation", lambda *args: "triton")
                patched.setattr(place, "launch", lambda *args, **more: launched.append(args))
                for _ in range(2):  # what is found the first time is remembered
                    launched.clear()
                    with calls() as counted:
                        ask()
                with Launches() as launches:
                    ask()
        called[layers, count], ran[layers, count] = counted["call"], launches.seen
        # What stands in front, and of every other group K and V, which int8 holds in different ways.
        assert len(launched) == 2 * (1 + layers // 4 * (2 if codec else 1))
    five, of_many_layers = called[8, 10] - called[8, 5], called[24, 10] - called[24, 5]
    assert five < 5 * 90 and abs(of_many_layers - five) < 10  # there are 4 groups more of them
    assert ran[24, 10] == ran[24, 5] and ran[8, 10] == ran[8, 5]


def test_a_layout_looks_no_further_than_it_has_to():
    """What is exact where it stands is found as by hashing everything in front of each chunk."""
    first, second = random_ids(5), random_ids(7)
    one = Chunk(tuple(first), document="d", number=0)
    two = Chunk(tuple(second), document="d", number=1, offset=5, context=digest(b"", first))
    three = Chunk((9,), document="d", number=2, offset=12, context=digest(two.context, second))
    cpu = torch.device("cpu")
    cases = {
        (one, two, three): [True] * 3,
        (one, three, two): [True, False, False],
        (two, one, three): [False] * 3,  # the third where it was, behind the same tokens in another order
        (one, Chunk(tuple(second)), three): [True, False, True],  # behind the same ids, of another chunk
        (one, Chunk(tuple(random_ids(7, 1))), three): [True, False, False],
    }
    for chunks, exact in cases.items():
        assert [placed.exact for placed in lay_out((1, 2), (1, 2), chunks, (3,), cpu).chunks] == exact
    layout = lay_out((), (), [one, two], (), cpu)
    assert layout.listed() == [*first, *second] == layout.ids.tolist() and layout.listed(3, 6) == layout.listed()[3:6]
    assert layout.span(*layout.chunks, first=6).tolist() == [*range(5), *range(5, 11)]
    assert layout.span().tolist() == [] and layout.span().dtype == torch.long
