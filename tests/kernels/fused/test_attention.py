"""Selective attention against an fp64 oracle: scattered queries, windows, caps, sinks, shared heads, odd shapes."""

import pytest
import torch

from ragkv.kernels import key_spans, selective_attention
from ragkv.kernels.scoring import Scoring
from ragkv.kernels.triton_impl import attention

EPS = torch.finfo(torch.float32).eps
CASES = {  # H, K, S, N, D and what else holds
    "one-token": (1, 1, 1, 1, 64, {}),
    "one-query-of-63": (2, 1, 1, 63, 64, {}),
    "63-of-257": (4, 2, 63, 257, 64, {}),
    "257-of-257": (1, 1, 257, 257, 64, {}),
    "dim-80": (4, 1, 17, 130, 80, {}),
    "seven-heads-share": (7, 1, 33, 100, 64, {}),
    "dim-128-window": (2, 1, 40, 300, 128, {"window": 50}),
    "window-of-one": (2, 2, 19, 70, 64, {"window": 1}),
    "window-longer-than-prompt": (2, 2, 19, 70, 64, {"window": 1000}),
    "chunks": (2, 1, 40, 200, 64, {"chunk": 64}),
    "softcap": (2, 1, 20, 90, 64, {"softcap": 2.0}),
    "sinks": (4, 2, 20, 90, 64, {"sinks": True}),
    "sinks-window-softcap": (4, 2, 20, 190, 64, {"sinks": True, "window": 30, "softcap": 5.0}),
    "dim-256": (2, 1, 20, 70, 256, {}),
    "scale": (2, 1, 20, 70, 64, {"scale": 0.3}),
}


def oracle(query, key, value, spans, scale, softcap, sinks):
    """Attention ``[S, H, D]`` in fp64, and the same of the values' magnitudes, by which rounding errors are measured."""
    groups = query.shape[0] // key.shape[0]
    query, (key, value) = query.double(), (t.double().repeat_interleave(groups, 0) for t in (key, value))
    scores = query @ key.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(key.shape[1], device=key.device)
    scores = scores.masked_fill((at < spans[:, :1]) | (at > spans[:, 1:]), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[1]].nan_to_num()
    return (weights @ value).transpose(0, 1), (weights @ value.abs()).transpose(0, 1)


@pytest.fixture
def compare(random, rounding, device):
    def run(query, key, value, spans, sinks=None, softcap=None, scale=None):
        got = selective_attention(query, key, value, spans, scale=scale, softcap=softcap, sinks=sinks, impl="triton")
        scale = query.shape[2] ** -0.5 if scale is None else scale
        want, magnitude = oracle(query, key, value, spans, scale, softcap, sinks)
        assert got.shape == want.shape and got.dtype == query.dtype
        assert not got.isnan().any()
        # Scores err by an fp32 sum over D; weights and output are rounded once each to the dtype.
        longest = (query.double().norm(dim=-1).amax() * key.double().norm(dim=-1).amax()).item()
        scores = EPS * query.shape[2] ** 0.5 * (1 + longest * scale)
        tolerance = 2 * rounding(query.dtype) + 4 * scores + 16 * EPS
        assert ((got.double() - want).abs() <= tolerance * magnitude + 1e-30).all()
        return got

    return run


def scattered(queries, keys, device):
    """Sorted positions, the last one the last key's."""
    generator = torch.Generator().manual_seed(keys)
    chosen = (
        torch.randperm(keys - 1, generator=generator)[: queries - 1].sort().values if queries > 1 else torch.empty(0)
    )
    return torch.cat([chosen.long(), torch.tensor([keys - 1])]).to(device)


IN_BF16 = ("one-token", "63-of-257", "dim-80", "dim-128-window", "sinks-window-softcap", "dim-256")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), *((case, torch.bfloat16) for case in IN_BF16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_against_the_oracle(case, dtype, device, random, compare):
    heads, kv_heads, queries, keys, dim, more = CASES[case]
    query = random(heads, queries, dim, dtype=dtype)
    # a cache has room behind what it holds: what stands there must not be seen
    key, value = random(kv_heads, keys + 9, dim, dtype=dtype), random(kv_heads, keys + 9, dim, dtype=dtype)
    key[:, keys:], value[:, keys:] = torch.nan, torch.nan
    spans = key_spans(scattered(queries, keys, device), window=more.get("window"), chunk=more.get("chunk"))
    sinks = random(heads) if more.get("sinks") else None
    compare(query, key[:, :keys], value[:, :keys], spans, sinks, more.get("softcap"), more.get("scale"))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in ("63-of-257", "chunks", "sinks-window-softcap")] + [("dim-80", torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("numbers", [128, 4096])
def test_keys_split_over_programs(numbers, case, dtype, device, random, compare, monkeypatch):
    """Parts that see nothing among them: windows leave most keys out. They are put together a few at a time, or all at once."""
    splits, plain = [], attention.parts_of
    monkeypatch.setattr(attention, "processors", lambda device: 10_000)
    monkeypatch.setattr(attention, "_PART", 60)
    monkeypatch.setattr(attention, "_COMBINED", numbers)
    monkeypatch.setattr(attention, "parts_of", lambda *counts: (splits.append(plain(*counts)), splits[-1])[1])
    heads, kv_heads, queries, keys, dim, more = CASES[case]
    query, (key, value) = random(heads, queries, dim, dtype=dtype), random(2, kv_heads, keys, dim, dtype=dtype)
    spans = key_spans(scattered(queries, keys, device), window=more.get("window"), chunk=more.get("chunk"))
    spans[0] = torch.tensor([1, 0])  # sees nothing at all
    compare(query, key, value, spans, random(heads) if more.get("sinks") else None, more.get("softcap"))
    assert splits == [keys // 60] and keys // 60 > 1


def test_keys_are_split_where_processors_would_idle():
    assert attention.parts_of(1, 16, 16384, 132) == 8
    assert attention.parts_of(1, 67, 16384, 132) == attention.parts_of(1, 500, 16384, 132) == 1
    assert attention.parts_of(1, 8, 2000, 132) == 3  # parts are worth their while
    assert attention.parts_of(1, 8, 100, 132) == 1


def test_rows_that_see_unlike_many_keys_are_split_further():
    """The longest of few programs would run while most processors had finished."""
    assert [attention.parts_of(tiles, 8, 16384, 132) for tiles in (2, 17, 33, 34, 77)] == [17, 2, 2, 1, 1]
    assert attention.parts_of(5, 8, 2000, 132) == 3
    assert attention.parts_of(17, 8, 16384, 132, 1024) == 1  # a window: all see alike
    assert attention.parts_of(17, 8, 16384, 132, 16384) == 2


@pytest.mark.parametrize("held", [0, 2, 4])
def test_heads_take_turns_as_far_as_the_cache_holds_them(held, device, random, compare, monkeypatch):
    beside, plain = [], attention.launch
    monkeypatch.setattr(attention, "_CACHED", held * 300 * 2 * 64 * 4)
    monkeypatch.setattr(
        attention, "launch", lambda *given, **more: (beside.append(given[16]), plain(*given, **more))[1]
    )
    query, (key, value) = random(8, 60, 64), random(2, 4, 300, 64)
    compare(query, key, value, key_spans(scattered(60, 300, device)))
    assert beside == [max(1, held)]


def test_few_rows_have_small_tiles():
    """What a tile holds beyond its rows is multiplied for nothing."""
    rows = [attention.tuning(128, torch.bfloat16, (9, 0), asked)["BLOCK_M"] for asked in (1, 16, 17, 64, 100, 500)]
    assert rows == [16, 16, 32, 64, 128, 128]
    assert attention.tuning(256, torch.float32, (9, 0), 3)["BLOCK_M"] == 16


def test_two_small_tiles_run_side_by_side(device, random, monkeypatch):
    splits = []
    monkeypatch.setattr(attention, "parts_of", lambda *counts: splits.append(counts) or 1)
    for queries in (1, 64):
        query = random(4, queries, 64, dtype=torch.bfloat16)
        key, value = random(2, 2, 80, 64, dtype=torch.bfloat16)
        attention.selective_attention(query, key, value, key_spans(scattered(queries, 80, device)), Scoring(0.1))
    own = attention.processors(device)
    assert splits == [(1, 2, 80, 2 * own, None), (1, 2, 80, own, None)]


def test_fp16(device, random, compare):
    query, (key, value) = random(4, 30, 64, dtype=torch.float16), random(2, 2, 150, 64, dtype=torch.float16)
    compare(query, key, value, key_spans(scattered(30, 150, device)))


def test_strided_as_transformers_passes_them(device, random, compare):
    query = random(1, 33, 4, 64).transpose(1, 2)[0]
    room = random(1, 2, 200, 64)
    compare(query, room[0, :, :140], room[0, :, 20:160], key_spans(scattered(33, 140, device)))


def test_positions_in_any_order_and_twice(device, random, compare):
    positions = torch.tensor([90, 3, 3, 50, 0, 99, 17], device=device)
    query, (key, value) = random(2, 7, 64), random(2, 1, 100, 64)
    compare(query, key, value, key_spans(positions))


def test_values_of_another_width(device, random, compare):
    compare(random(2, 9, 64), random(1, 50, 64), random(1, 50, 32), key_spans(scattered(9, 50, device)))


def test_a_query_sees_exactly_its_span(device, random):
    """A key's value reaches a query if, and only if, it stands within the query's span: edges counted."""
    query, key, value = random(1, 6, 64), random(1, 140, 64), torch.zeros(1, 140, 64, device=device)
    spans = torch.tensor([[0, 0], [10, 20], [63, 64], [64, 127], [128, 139], [5, 4]], dtype=torch.int32, device=device)
    for position in (0, 1, 9, 10, 20, 21, 62, 63, 64, 65, 127, 128, 139):
        value[:] = 0
        value[0, position] = 1
        got = selective_attention(query, key, value, spans, impl="triton")[:, 0, 0] != 0
        assert torch.equal(got, (spans[:, 0] <= position) & (position <= spans[:, 1])), position


def test_nothing_to_do(device, random):
    got = selective_attention(
        random(2, 0, 64),
        random(1, 5, 64),
        random(1, 5, 64),
        key_spans(torch.empty(0, dtype=torch.long, device=device)),
        impl="triton",
    )
    assert got.shape == (0, 2, 64)
