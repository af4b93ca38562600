"""What the operations accept, which implementation runs, and the references against fp64."""

import ast
from pathlib import Path

import pytest
import torch

from ragkv.errors import MissingPackageError, RagKVError
from ragkv.kernels import (
    KernelError,
    Layers,
    Piece,
    Run,
    Stored,
    Turn,
    deviation,
    dispatch,
    implementation,
    key_spans,
    place,
    place_layers,
    place_pieces,
    scatter,
    scored_attention,
    selective_attention,
    slots_of,
)
from ragkv.store.codecs import get_codec
from tests.fresh import fresh


def layers(tokens, dim=16):
    """One layer's K and V."""
    return Layers.raw([(torch.zeros(2, tokens, dim), torch.zeros(2, tokens, dim))])


def turned(start, length, turns={}):  # noqa: B006
    """A chunk of 4 tokens whose keys turn by the same table as others'."""
    made = turns.setdefault(length, [Turn(torch.ones(length, 8), torch.ones(length, 8))])
    return Run(layers(4), start, 4, turns=made)


Q, KV, SPANS = torch.randn(4, 3, 16), torch.randn(2, 9, 16), key_spans(torch.tensor([2, 5, 8]))
WEIGHTS = torch.tensor([0.5, 1.0, 0.25])


def test_triton_is_loaded_when_asked_for():
    code = """
import sys, torch
before = "triton" in sys.modules
from ragkv import kernels
ones = torch.ones(1, 2, 3)
assert ("triton" in sys.modules) == before
sys.modules["triton"] = None
kernels.deviation(ones, ones)
try:
    kernels.deviation(ones, ones, impl="triton")
except kernels.dispatch.MissingPackageError as error:
    print(error)
"""
    assert "pip install 'ragkv[triton]'" in fresh(code)


def test_no_silent_fallback(monkeypatch):
    assert implementation("auto", "cpu") == implementation("reference", "cpu") == "reference"
    with pytest.raises(KernelError, match="CUDA device, got cpu"):
        deviation(Q, Q, impl="triton")
    with pytest.raises(KernelError, match="auto, reference, triton, got 'cuda'"):
        deviation(Q, Q, impl="cuda")
    with pytest.raises(KernelError, match="float64"):
        implementation("triton", "cpu", torch.float64)
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    with pytest.raises(MissingPackageError, match="pip install"):
        implementation("triton", "cuda")
    assert issubclass(KernelError, RagKVError)


def test_a_gpu_that_triton_does_not_serve(monkeypatch):
    monkeypatch.setattr(dispatch, "_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert implementation("auto", "cuda") == "reference"
    with pytest.raises(KernelError, match=r"8\.0 or later"):
        implementation("triton", "cuda")
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    assert implementation("auto", "cuda") == "triton"
    assert implementation("auto", "cuda", torch.float64) == "reference"


REFUSED = {
    "out-shape": (
        lambda: place(torch.empty(2, 3, 8), torch.empty(2, 4, 8)),
        r"\[H, T, D\] = \[2, 4, 8\], got \[2, 3, 8\]",
    ),
    "table-length": (lambda: place(KV, KV, torch.ones(8, 8), torch.ones(8, 8)), r"cos must be .*got \[8, 8\]"),
    "table-width": (lambda: place(KV, KV, torch.ones(9, 9), torch.ones(9, 9)), "18 dimensions, head_dim is 16"),
    "table-dtype": (lambda: place(KV, KV, torch.ones(9, 8).half(), torch.ones(9, 8)), "float32"),
    "one-table": (lambda: place(KV, KV, torch.ones(9, 8)), "both"),
    "codec": (lambda: place(KV, Stored(KV, (2, 9, 16), "zip")), "raw, int8, int4 or fp8, got 'zip'"),
    "no-scale": (lambda: place(KV, Stored(KV, (2, 9, 16), "fp8")), "needs its scales"),
    "slots": (
        lambda: place(KV, Stored(KV[None], (2, 9, 16), slots=torch.zeros(8).long())),
        r"slots must be \[T\] = \[9\]",
    ),
    "layers-kinds": (lambda: place_layers(layers(9), [Run(layers(9, 8), 0, 9)]), r"source has \(\(2, 8\), \(2, 8\)\)"),
    "layers-slots": (lambda: place_layers(layers(9), [Run(layers(4), 6, 4)]), "slots 6 to 10 of 9"),
    "layers-front": (lambda: place_layers(layers(9), [Run(layers(4), -1, 4)]), "slots -1 to 3 of 9"),
    "layers-part": (
        lambda: place_layers(layers(9), [Run(layers(4), 0, 5)]),
        "of 4 tokens of a chunk all are placed, or the first ones of numbers, got 5",
    ),
    "layers-no-pool": (lambda: place_layers(layers(9), [Run(layers(4), 0, 4, torch.arange(4))]), "given of pools"),
    "layers-pool": (
        lambda: place_layers(layers(9), [Run(Layers.pool([(KV[None], KV[None])]), 0, 9)]),
        "given of pools",
    ),
    "layers-int32": (
        lambda: place_layers(layers(9), [Run(Layers.pool([(KV[None], KV[None])]), 0, 9, torch.arange(9).int())]),
        "int64 on the CPU, got torch.int32",
    ),
    "layers-range": (lambda: place_layers(layers(9), [], layers=range(2)), r"1 layers, got range\(0, 2\)"),
    "layers-out": (lambda: place_layers(Layers.pool([(KV[None], KV[None])]), []), "out must be numbers"),
    "layers-turns": (lambda: place_layers(layers(9), [Run(layers(4), 0, 4, turns=[])]), "out has 1 layers, 0 turn"),
    "layers-short-turn": (lambda: place_layers(layers(9), [turned(4, 3), turned(0, 3)]), "reach to slot 7, got 3"),
    "layers-device": (
        lambda: place_layers(layers(9), [Run(Layers.raw([(KV.to("meta"), KV.to("meta"))]), 0, 9)]),
        "out is on cpu, the source on meta",
    ),
    "layers-uneven": (lambda: Layers.raw([(KV, KV[:, :8])]), "the same tokens"),
    "fresh-dtype": (lambda: deviation(KV, KV.half()), "one dtype and device"),
    "rows": (lambda: deviation(KV, KV, rows=torch.zeros(8).long()), "rows"),
    "rows-dtype": (lambda: scatter(KV, KV, torch.zeros(9), KV, KV), "int32 or int64"),
    "heads": (lambda: selective_attention(Q[:3], KV, KV, SPANS), "multiple of kv heads, got 3 and 2"),
    "spans": (lambda: selective_attention(Q, KV, KV, SPANS[:2]), r"spans must be \[S, 2\] = \[3, 2\], got \[2, 2\]"),
    "spans-dtype": (lambda: selective_attention(Q, KV, KV, SPANS.long()), "int32"),
    "value": (lambda: selective_attention(Q, KV, KV[:, :8], SPANS), "value"),
    "sinks": (lambda: scored_attention(Q, KV, KV, SPANS, WEIGHTS, sinks=torch.ones(3)), "sinks"),
    "softcap": (lambda: scored_attention(Q, KV, KV, SPANS, WEIGHTS, softcap=0.0), "softcap must be positive"),
    "weights": (lambda: scored_attention(Q, KV, KV, SPANS, WEIGHTS[:2]), r"weights must be \[S\] = \[3\], got \[2\]"),
    "weights-dtype": (lambda: scored_attention(Q, KV, KV, SPANS, WEIGHTS.double()), "float32"),
    "weights-device": (lambda: scored_attention(Q, KV, KV, SPANS, WEIGHTS.to("meta")), "must be on cpu"),
    "both-rules": (lambda: key_spans(torch.arange(3), window=2, chunk=2), "exclude"),
    "window": (lambda: key_spans(torch.arange(3), window=0), "positive"),
    "chunk": (lambda: key_spans(torch.arange(3), chunk=0), "positive"),
    "wide-heads": (
        lambda: selective_attention(*[torch.ones(1, 1, 320)] * 3, SPANS[:1], impl="triton"),
        "256 dimensions, got 320",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(KernelError, match=message):
        call()


def test_spans():
    positions = torch.tensor([0, 3, 8, 9])
    assert key_spans(positions).tolist() == [[0, 0], [0, 3], [0, 8], [0, 9]]
    assert key_spans(positions, window=3).tolist() == [[0, 0], [1, 3], [6, 8], [7, 9]]
    assert key_spans(positions, chunk=4).tolist() == [[0, 0], [0, 3], [8, 8], [8, 9]]


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("shape", [(2, 63, 80), (1, 1, 16), (3, 130, 64)], ids=str)
def test_the_reference_decodes_what_the_store_encodes(shape, codec, side):
    original = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    parts = get_codec(codec).encode(original, side)
    out = torch.full(shape, torch.nan)
    place(out, Stored.encoded(codec, parts, shape, side))
    torch.testing.assert_close(out, get_codec(codec).decode(parts, shape, torch.float32, side), rtol=0, atol=0)


def test_the_reference_reads_pools():
    pool = torch.randn(6, 2, 4, 8)
    slots = slots_of(torch.tensor([5, 0, 3]), 4, 10)
    out = torch.full((2, 10, 8), torch.nan)
    place_pieces([Piece(out, Stored.paged(pool, slots))])
    assert torch.equal(out, torch.cat([pool[5], pool[0], pool[3, :, :2]], 1))


def test_the_reference_turns_keys_where_they_are():
    keys, angles = torch.randn(2, 9, 16), torch.rand(9, 8)
    want = torch.empty_like(keys)
    place(want, keys, angles.cos(), angles.sin())
    place(keys, keys, angles.cos(), angles.sin())
    assert torch.equal(keys, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_reference_scatters(dtype):
    keys, values = torch.randn(2, 9, 16), torch.randn(2, 9, 8)
    before = keys.clone(), values.clone()
    rows, fresh_keys, fresh_values = torch.tensor([7, 2], dtype=dtype), torch.randn(2, 2, 16), torch.randn(2, 2, 8)
    scatter(fresh_keys, fresh_values, rows, keys, values)
    assert torch.equal(keys[:, rows], fresh_keys) and torch.equal(values[:, rows], fresh_values)
    assert torch.equal(keys[:, :2], before[0][:, :2])
    gaps = (fresh_keys - before[0][:, rows]).square().sum((0, 2))
    torch.testing.assert_close(deviation(fresh_keys, before[0], rows=rows), gaps)


@pytest.mark.parametrize(
    "more",
    [{}, {"softcap": 2.0}, {"sinks": torch.randn(4)}, {"scale": 0.3}],
    ids=lambda more: next(iter(more), "plain"),
)
def test_the_attention_reference(more):
    """Row by row, by the definition, in fp64."""
    spans = torch.tensor([[0, 2], [3, 5], [4, 3]], dtype=torch.int32)
    (got, scores_of), alone = (
        scored_attention(Q, KV, KV, spans, WEIGHTS, **more),
        selective_attention(Q, KV, KV, spans, **more),
    )
    assert torch.equal(got, alone)
    want, total = torch.zeros(3, 4, 16, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    for head in range(4):
        for query, (first, last) in enumerate(spans.tolist()):
            keys = KV[head // 2, first : last + 1].double()
            scores = keys @ Q[head, query].double() * more.get("scale", 0.25)
            scores = more["softcap"] * torch.tanh(scores / more["softcap"]) if "softcap" in more else scores
            sink = more["sinks"][head].double().exp() if "sinks" in more else 0.0
            weights = scores.exp() / (scores.exp().sum() + sink)
            want[query, head], share = weights @ keys, weights * WEIGHTS[query].double() / 4
            total[first : last + 1] += share
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores_of.double(), total, rtol=1e-5, atol=1e-6)


def test_the_fused_versions_never_import_the_reference():
    files = list((Path(__file__).parents[2] / "kernels" / "triton_impl").glob("*.py"))
    assert len(files) > 4
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", "") or ""]
            assert not any("reference" in str(name) for name in names), path
