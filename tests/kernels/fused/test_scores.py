"""What a question attends to against an fp64 oracle."""

import pytest
import torch

from ragkv.kernels import key_spans, scored_attention, selective_attention

EPS = torch.finfo(torch.float32).eps
CASES = {  # H, K, S, N, D and what else holds
    "one-token": (1, 1, 1, 1, 64, {}),
    "question-behind-257": (4, 2, 9, 257, 64, {}),
    "63-keys-dim-80": (2, 1, 5, 63, 80, {}),
    "several-pieces": (2, 1, 3, 1100, 64, {}),
    "many-rows": (4, 1, 21, 90, 64, {}),
    "window": (2, 2, 7, 200, 64, {"window": 20}),
    "softcap-sinks": (4, 2, 7, 100, 64, {"softcap": 3.0, "sinks": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, dtype, device, random):
    heads, kv_heads, queries, keys, dim, more = CASES[case]
    query, key = random(heads, queries, dim, dtype=dtype), random(kv_heads, keys + 5, dim, dtype=dtype)
    key[:, keys:] = torch.nan  # room behind what the cache holds
    key = key[:, :keys]
    spans = key_spans(torch.arange(keys - queries, keys, device=device), window=more.get("window"))
    sinks, softcap = random(heads) if more.get("sinks") else None, more.get("softcap")
    value, more_of = random(kv_heads, keys, dim, dtype=dtype), {"softcap": softcap, "sinks": sinks, "impl": "triton"}
    weights = torch.rand(queries, generator=torch.Generator().manual_seed(queries)).to(device)
    out, got = scored_attention(query, key, value, spans, weights, **more_of)
    assert torch.equal(out, selective_attention(query, key, value, spans, **more_of))

    scores = query.double() @ key.double().repeat_interleave(heads // kv_heads, 0).transpose(1, 2) * dim**-0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    at = torch.arange(keys, device=device)
    scores = scores.masked_fill((at < spans[:, :1]) | (at > spans[:, 1:]), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, queries, 1)], -1)
    want = weights.double() @ scores.softmax(-1)[..., :keys].mean(0)
    assert got.dtype == torch.float32 and not got.isnan().any()
    # a weight errs by its score's error and its normaliser's; scores are fp32 sums over D, exponents are added in log2
    longest = float(query.double().norm(dim=-1).amax() * key.double().norm(dim=-1).amax()) * dim**-0.5
    tolerance = EPS * (4 * dim**0.5 * (1 + longest) + 32)
    assert ((got.double() - want).abs() <= tolerance * want + EPS).all()
    assert more.get("sinks") or abs(float(got.sum() - weights.sum())) < 1e-3 * float(weights.sum())


def test_nothing_to_do(device, random):
    none = torch.empty(0, dtype=torch.long, device=device)
    held = random(1, 5, 64)
    out, scores = scored_attention(random(2, 0, 64), held, held, key_spans(none), none.float(), impl="triton")
    assert out.shape == (0, 2, 64) and scores.shape == (5,) and not scores.any()


def test_who_sees_nothing_counts_nothing(device, random):
    query, held, weights = random(2, 3, 64), random(1, 40, 64), torch.ones(3, device=device)
    spans = key_spans(torch.arange(37, 40, device=device))
    spans[1] = torch.tensor([1, 0])
    some = torch.tensor([0, 2], device=device)
    out, scores = scored_attention(query, held, held, spans, weights, impl="triton")
    want, alone = scored_attention(query[:, some], held, held, spans[some], weights[some], impl="triton")
    assert not out[1].any()
    torch.testing.assert_close(out[some], want)
    torch.testing.assert_close(scores, alone)
