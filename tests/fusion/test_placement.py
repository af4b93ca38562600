"""Chunks are placed from what their tier holds: the blocks of a pool, encoded numbers, or numbers as they are."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ragkv import Engine, LegoLink, PromptTemplate, Reuse, TieredStore
from ragkv.chunk import Chunk, ChunkKV
from ragkv.fusion import placement
from ragkv.fusion.layout import lay_out
from ragkv.fusion.supply import Supply, layers_of
from ragkv.kernels import slots_of
from ragkv.model.decoder import Decoder
from ragkv.store.codecs import get_codec
from ragkv.testing import random_ids, tiny_model

from .test_bus import Late

PREFIX, PAGE = (1, 5, 6), 4  # tokens of a block


class Shelf:
    """A batch that shows how each chunk is held: ``"pool"``, or the name of a codec."""

    bytes_read = 0

    def __init__(self, chunks, ways):
        self.chunks, self.ways = chunks, ways
        self.keys = [bytes([number]) for number in range(len(chunks))]
        self.codecs = ["raw" if way == "pool" else way for way in ways]
        self.unrotated = [False] * len(ways)
        order = iter(torch.randperm(64, generator=torch.Generator().manual_seed(0)).split(8))
        taken = [next(order)[: -(-len(kv) // PAGE)] for kv in chunks]
        self.blocks = [blocks if way == "pool" else None for blocks, way in zip(taken, ways, strict=True)]
        lengths = map(len, chunks)
        self.slots = [None if b is None else slots_of(b, PAGE, n) for b, n in zip(self.blocks, lengths, strict=True)]
        self.device, self.asked = "cpu", 0
        self._kept, self._pools = {}, {}

    def kept(self, index):
        return self._kept

    def read_ahead(self):
        pass

    def layer(self, index, layer):
        return self.chunks[index].keys[layer], self.chunks[index].values[layer]

    def parts(self, index, layer):
        if self.ways[index] == "pool":
            self.asked += 1
            if layer not in self._pools:
                pools = [self.pool([kv_side(kv, layer, side) for kv in self.chunks]) for side in "kv"]
                self._pools[layer] = [{"": pool.to(self.device)} for pool in pools]
            return self._pools[layer]
        return [get_codec(self.ways[index]).encode(kv_side(self.chunks[index], layer, side), side) for side in "kv"]

    def pool(self, held):
        pool = torch.full((64, held[0].shape[0], PAGE, held[0].shape[2]), torch.nan)
        for numbers, blocks in zip(held, self.blocks, strict=True):
            for block, part in zip([] if blocks is None else blocks, numbers.split(PAGE, 1), strict=blocks is not None):
                pool[block, :, : part.shape[1]] = part
        return pool


def kv_side(kv, layer, side):
    return (kv.keys if side == "k" else kv.values)[layer]


@pytest.fixture(scope="module")
def decoder():
    return Decoder(tiny_model("gemma3_text"), kernels="reference")  # two rotations


@pytest.fixture
def place(decoder, monkeypatch):
    """Places chunks of some lengths, held in some ways.

    Returns what the cache then holds, how many runs went at once, and how many pieces each layer was besides.
    """

    def run(lengths, ways, fresh=(), change=lambda batch: None, starts=None, again=0, front=None):
        layout = lay_out(
            PREFIX, PREFIX, [Chunk(tuple(random_ids(n))) for n in lengths], random_ids(4), decoder.device, starts
        )
        batch = Shelf([random_kv(decoder, n) for n in lengths], ways)
        change(batch)
        runs, pieces = [], []
        at_once, one_by_one = placement.place_layers, placement.place_pieces
        monkeypatch.setattr(
            placement,
            "place_layers",
            lambda out, some, **more: (runs.append(len(some)), at_once(out, some, **more)),
        )
        monkeypatch.setattr(
            placement, "place_pieces", lambda some, impl: (pieces.append(len(some)), one_by_one(some, impl=impl))
        )
        keys = {item.chunk: key for item, key in zip(layout.chunks, batch.keys, strict=True)}
        new = {batch.keys[number]: batch.chunks[number] for number in fresh}
        for _ in range(1 + again):
            cache = decoder.cache(layout.tokens)
            for layer in cache.layers:
                layer.key_room.fill_(torch.nan)
                layer.value_room.fill_(torch.nan)
            work = placement.Placement(decoder, cache, layout, batch, keys, new, by_layer=True, front=front)
            work.ahead()
            if not set(ways) - {"pool"} and batch.device == "cpu" and front is None:
                assert not any(layer.key_room[0, :, 3:-4].isnan().any() for layer in cache.layers)
            for number in range(len(cache.layers)):
                work.upto(number)
        monkeypatch.setattr(placement, "place_layers", at_once)
        monkeypatch.setattr(placement, "place_pieces", one_by_one)
        span = slice(layout.chunks_start, layout.suffix_start)
        held = [room[0, :, span] for layer in cache.layers for room in (layer.key_room, layer.value_room)]
        return held, (runs, pieces), batch

    return run


def random_kv(decoder, tokens):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(spec.heads, tokens, dim) for spec in decoder.specs for dim in (spec.key_dim, spec.value_dim)]
    numbers = [torch.randn(shape, generator=generator) for shape in shapes]
    return ChunkKV(numbers[::2], numbers[1::2], len(PREFIX))


LENGTHS = (9, 4, 17, 1, 12)


def test_what_a_pool_holds_is_placed_at_once(place):
    want, apart, _ = place(LENGTHS, ["raw"] * 5)
    got, together, batch = place(LENGTHS, ["pool"] * 5, again=2)
    # the first chunk stays where it was, all others turn: two runs, of all layers, before the first layer is asked for
    assert apart == ([], [10] * 4) and together == ([2] * 3, [])
    assert batch.asked == 4  # what was found of the pool stays with it
    assert not any(a.isnan().any() for a in got)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_chunks_that_share_positions(place):
    starts = [20, 3, 3, 7, 50]  # the second and the third where they were made: none is neighbour to one that turns
    want, _, _ = place(LENGTHS, ["raw"] * 5, starts=starts)
    got, (runs, pieces), _ = place(LENGTHS, ["pool"] * 5, starts=starts)
    assert (runs, pieces) == ([3], [])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("ways", "want_counts"),
    [
        (("pool", "int8", "pool", "fp8", "int4"), ([2], [6] * 4)),
        (("int8", "pool", "fp8", "pool", "pool"), ([2], [4] * 4)),  # what lies between parts a pool, too
    ],
)
def test_what_is_encoded_is_decoded_on_the_way(place, decoder, ways, want_counts):
    got, counts, _ = place(LENGTHS, ways)
    assert counts == want_counts

    def decoded(batch):
        for kv, way in zip(batch.chunks, ways, strict=True):
            codec = get_codec("raw" if way == "pool" else way)
            for held, side in ((kv.keys, "k"), (kv.values, "v")):
                held[:] = [codec.decode(codec.encode(t, side), t.shape, t.dtype, side) for t in held]

    want, _, _ = place(LENGTHS, ["raw"] * 5, change=decoded)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_what_was_just_computed_parts_a_pool(place):
    want, _, _ = place(LENGTHS, ["raw"] * 5)
    got, counts, _ = place(LENGTHS, ["pool"] * 5, fresh=[2])
    assert counts == ([4], [])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_was_computed_elsewhere_is_placed_by_itself(place, decoder, monkeypatch):
    """What stands in front, before all else."""
    front = random_kv(decoder, len(PREFIX))
    want, counts, _ = place(LENGTHS, ["pool"] * 5, fresh=[2], front=front)
    assert counts == ([5], [])
    monkeypatch.setattr(Supply, "beside", lambda *_: False)
    got, counts, _ = place(LENGTHS, ["pool"] * 5, fresh=[2], front=front)
    assert counts == ([3], [2] * 4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_a_prompt_takes_late_stands_in_the_place_of_what_was_to_come(decoder):
    """Also where placing has begun, by what the layout said before."""
    layout = lay_out(PREFIX, PREFIX, [Chunk(tuple(random_ids(n))) for n in (9, 4)], random_ids(4), decoder.device)
    batch, other = Shelf([random_kv(decoder, n) for n in (9, 4)], ["int8", "raw"]), random_kv(decoder, 9)
    keys = {item.chunk: key for item, key in zip(layout.chunks, batch.keys, strict=True)}
    cache = decoder.cache(layout.tokens)
    work = placement.Placement(decoder, cache, layout, batch, keys, {}, by_layer=True)
    work.ahead()
    first = replace(layout.chunks[0], path=b"path", whole=True)
    work.take(replace(layout, chunks=(first, layout.chunks[1])), {b"path": other})
    work.upto(len(cache.layers) - 1)
    for number, layer in enumerate(cache.layers):
        values = torch.cat([other.values[number], batch.chunks[1].values[number]], 1)
        assert torch.equal(layer.value_room[0, :, layout.chunks_start : layout.suffix_start], values)


def test_a_pool_on_another_device_is_read_chunk_by_chunk(place):
    def elsewhere(batch):
        batch.device = "meta"

    want, _, _ = place(LENGTHS, ["raw"] * 5)
    got, counts, _ = place(LENGTHS, ["pool"] * 5, change=elsewhere)
    assert counts == ([], [10] * 4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({"gpu_bytes": 1 << 20, "device": "cpu", "codec": "int8"}, "pool"),  # the pool holds numbers as they are
        ({"codec": "fp8", "cpu_bytes": 0}, "fp8"),
        ({"codec": "int4", "cpu_bytes": 0}, "int4"),  # keys lie as before rotary embedding
        ({"cpu_codec": "int8"}, "int8"),
        ({"codec": "lossless", "cpu_bytes": 0}, "raw"),  # decoded by the store
    ],
    ids=lambda value: value.get("codec") if isinstance(value, dict) else None,
)
def test_what_a_store_holds(settings, held, tmp_path, monkeypatch):
    """As on an accelerator, layer by layer; and as on the CPU, where the store decodes chunk by chunk."""
    init, plain, layers, seen = placement.Placement.__init__, placement.place_pieces, placement.place_layers, []
    with Engine(
        tiny_model(), template=PromptTemplate(prefix=[*PREFIX]), store=TieredStore(tmp_path, **settings)
    ) as engine:
        chunks = engine.add([random_ids(n) for n in (20, 31, 7)])
        engine.fuse(chunks, random_ids(5), method=Reuse())  # moves them up
        want = engine.fuse(chunks[::-1], random_ids(5), method=LegoLink(2))
        monkeypatch.setattr(placement.Placement, "__init__", lambda *args, **more: init(*args, **more, by_layer=True))
        monkeypatch.setattr(
            placement,
            "place_pieces",
            lambda pieces, impl: (seen.extend(piece.stored.codec for piece in pieces), plain(pieces, impl=impl)),
        )
        monkeypatch.setattr(
            placement,
            "place_layers",
            lambda out, runs, **more: (
                seen.extend("pool" if run.source.paged else "raw" for run in runs if run.start),
                layers(out, runs, **more),
            ),
        )
        got = engine.fuse(chunks[::-1], random_ids(5), method=LegoLink(2))
    assert set(seen) == {held}
    assert got.report.hits == want.report.hits and got.report.bytes_read == want.report.bytes_read
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by_layer", [False, True], ids=["chunk by chunk", "by layer"])
@pytest.mark.parametrize("cpu_bytes", [0, 1 << 20], ids=["disk", "cpu"])
@pytest.mark.parametrize("codec", ["raw", "int8", "fp8"])
def test_a_record_that_contradicts_itself_is_read_again(codec, cpu_bytes, by_layer, tmp_path, monkeypatch):
    """Whoever wrote it: its checksums hold. Also where kernels, not the store, decode it; and it is not tried again and again."""
    model, template, kind = tiny_model(), PromptTemplate(prefix=[*PREFIX]), type(get_codec(codec))
    encode, ids, question = kind.encode, [random_ids(20)], random_ids(5)

    def spoiled(self, tensor, side, depth=0.0):
        parts = encode(self, tensor, side, depth)
        return {**parts, "": parts[""].narrow(-1, 0, parts[""].shape[-1] - 1).contiguous()} if side == "v" else parts

    with Engine(model, template=template, method=Reuse()) as engine:
        want = engine.fuse(engine.add(ids), question)
    with (
        monkeypatch.context() as patched,
        Engine(model, template=template, store=TieredStore(tmp_path, codec=codec, cpu_bytes=0)) as engine,
    ):
        patched.setattr(kind, "encode", spoiled)
        engine.add(ids)
    init = placement.Placement.__init__
    monkeypatch.setattr(placement.Placement, "__init__", lambda *args, **more: init(*args, **more, by_layer=by_layer))
    monkeypatch.setattr(placement, "bus", lambda device: Late())
    store = TieredStore(tmp_path, codec=codec, cpu_bytes=cpu_bytes)
    with Engine(model, template=template, method=Reuse(), store=store) as engine:
        chunks = engine.add(ids)
        store.prefetch(engine.documents.keys(chunks)).result()
        first, again = (engine.fuse(chunks, question) for _ in range(2))
    torch.testing.assert_close(first.logits, want.logits, atol=1e-5, rtol=1e-5)
    assert first.report.hits == {"computed": 1} and "computed" not in again.report.hits


def test_what_was_found_of_tensors_goes_with_them():
    kv = ChunkKV([torch.randn(2, 5, 4)], [torch.randn(2, 5, 4)], 0)
    found = layers_of(kv)
    assert layers_of(kv) is found and not replace(kv, base=1).kept
    found.described = "addresses"
    assert layers_of(deepcopy(kv)).described is None, "copies lie elsewhere"
    kv.values[0] = torch.randn(2, 5, 4)
    assert layers_of(kv).pairs[0][1].numbers is kv.values[0]
