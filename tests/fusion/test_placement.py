"""Chunks are placed from what their tier holds: the blocks of a pool, encoded numbers, or numbers as they are."""

import pytest
import torch

from ragkv import Engine, LegoLink, PromptTemplate, Reuse, TieredStore
from ragkv.chunk import Chunk, ChunkKV
from ragkv.fusion import placement
from ragkv.fusion.layout import lay_out
from ragkv.model.decoder import Decoder
from ragkv.store.codecs import get_codec
from ragkv.testing import random_ids, tiny_model

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

    def read_ahead(self):
        pass

    def layer(self, index, layer):
        return self.chunks[index].keys[layer], self.chunks[index].values[layer]

    def parts(self, index, layer):
        if self.ways[index] == "pool":
            return [{"": self.pool([kv_side(kv, layer, side) for kv in self.chunks])} for side in "kv"]
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
    """Places chunks of some lengths, held in some ways; what the cache then holds, and how many pieces each layer was."""

    def run(lengths, ways, fresh=(), change=lambda batch: None):
        layout = lay_out(PREFIX, PREFIX, [Chunk(tuple(random_ids(n))) for n in lengths], random_ids(4), decoder.device)
        batch = Shelf([random_kv(decoder, n) for n in lengths], ways)
        change(batch)
        cache, counts, placed = decoder.cache(layout.tokens), [], placement.place_pieces
        monkeypatch.setattr(
            placement, "place_pieces", lambda pieces, impl: (counts.append(len(pieces)), placed(pieces, impl=impl))
        )
        keys = {item.chunk: key for item, key in zip(layout.chunks, batch.keys, strict=True)}
        new = {batch.keys[number]: batch.chunks[number] for number in fresh}
        work = placement.Placement(decoder, cache, layout, batch, keys, new, by_layer=True)
        for number, layer in enumerate(cache.layers):
            layer.key_room.fill_(torch.nan)
            layer.value_room.fill_(torch.nan)
            work.upto(number)
        monkeypatch.setattr(placement, "place_pieces", placed)
        span = slice(layout.chunks_start, layout.suffix_start)
        return [room[0, :, span] for layer in cache.layers for room in (layer.key_room, layer.value_room)], counts

    return run


def random_kv(decoder, tokens):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(spec.heads, tokens, dim) for spec in decoder.specs for dim in (spec.key_dim, spec.value_dim)]
    numbers = [torch.randn(shape, generator=generator) for shape in shapes]
    return ChunkKV(numbers[::2], numbers[1::2], len(PREFIX))


LENGTHS = (9, 4, 17, 1, 12)


def test_neighbours_in_a_pool_are_one_piece(place):
    want, apart = place(LENGTHS, ["raw"] * 5)
    got, together = place(LENGTHS, ["pool"] * 5)
    # the first chunk stays where it was, all others turn: K and V of both
    assert apart == [10] * 4 and together == [4] * 4
    assert not any(a.isnan().any() for a in got)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_is_encoded_is_decoded_on_the_way(place, decoder):
    ways = ("pool", "int8", "pool", "fp8", "int4")
    got, counts = place(LENGTHS, ways)
    assert counts == [10] * 4

    def decoded(batch):
        for kv, way in zip(batch.chunks, ways, strict=True):
            codec = get_codec("raw" if way == "pool" else way)
            for held, side in ((kv.keys, "k"), (kv.values, "v")):
                held[:] = [codec.decode(codec.encode(t, side), t.shape, t.dtype, side) for t in held]

    want, _ = place(LENGTHS, ["raw"] * 5, change=decoded)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_what_was_just_computed_parts_a_pool(place):
    want, _ = place(LENGTHS, ["raw"] * 5)
    got, counts = place(LENGTHS, ["pool"] * 5, fresh=[2])
    assert counts == [8] * 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_pool_on_another_device_is_read_chunk_by_chunk(place):
    def elsewhere(batch):
        batch.blocks = [blocks.to("meta") for blocks in batch.blocks]

    want, _ = place(LENGTHS, ["raw"] * 5)
    got, counts = place(LENGTHS, ["pool"] * 5, change=elsewhere)
    assert counts == [10] * 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({"gpu_bytes": 1 << 20, "device": "cpu", "codec": "int8"}, ("raw", True)),  # the pool holds numbers as they are
        ({"codec": "fp8", "cpu_bytes": 0}, ("fp8", False)),
        ({"codec": "int4", "cpu_bytes": 0}, ("int4", False)),  # keys lie as before rotary embedding
        ({"cpu_codec": "int8"}, ("int8", False)),
        ({"codec": "lossless", "cpu_bytes": 0}, ("raw", False)),  # decoded by the store
    ],
    ids=lambda value: value.get("codec") if isinstance(value, dict) else None,
)
def test_what_a_store_holds(settings, held, tmp_path, monkeypatch):
    """As on an accelerator, layer by layer; and as on the CPU, where the store decodes chunk by chunk."""
    init, plain, seen = placement.Placement.__init__, placement.place_pieces, []
    with Engine(
        tiny_model(), template=PromptTemplate(prefix=[*PREFIX]), store=TieredStore(tmp_path, **settings)
    ) as engine:
        chunks = engine.add([random_ids(n) for n in (20, 31, 7)])
        engine.fuse(chunks, random_ids(5), method=Reuse())  # moves them up
        want = engine.fuse(chunks[::-1], random_ids(5), method=LegoLink(2))
        monkeypatch.setattr(placement.Placement, "__init__", lambda *args, **more: init(*args, **more, by_layer=True))
        monkeypatch.setattr(
            placement, "place_pieces", lambda pieces, impl: (seen.extend(pieces), plain(pieces, impl=impl))
        )
        got = engine.fuse(chunks[::-1], random_ids(5), method=LegoLink(2))
    assert {(piece.stored.codec, piece.stored.slots is not None) for piece in seen} == {held}
    assert got.report.hits == want.report.hits and got.report.bytes_read == want.report.bytes_read
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)
