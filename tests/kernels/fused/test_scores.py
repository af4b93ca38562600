"""Question scores against an fp64 oracle."""

import pytest
import torch

from ragkv.kernels import key_spans, question_scores

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
    got = question_scores(query, key, spans, softcap=softcap, sinks=sinks, impl="triton")

    scores = query.double() @ key.double().repeat_interleave(heads // kv_heads, 0).transpose(1, 2) * dim**-0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    at = torch.arange(keys, device=device)
    scores = scores.masked_fill((at < spans[:, :1]) | (at > spans[:, 1:]), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, queries, 1)], -1)
    want = scores.softmax(-1)[..., :keys].sum((0, 1))
    assert got.dtype == torch.float32 and not got.isnan().any()
    # a weight errs by its score's error and its normaliser's; scores are fp32 sums over D, exponents are added in log2
    longest = float(query.double().norm(dim=-1).amax() * key.double().norm(dim=-1).amax()) * dim**-0.5
    tolerance = EPS * (4 * dim**0.5 * (1 + longest) + 32)
    assert ((got.double() - want).abs() <= tolerance * want + EPS).all()
    assert more.get("sinks") or abs(float(got.sum()) - heads * queries) < 1e-3 * heads * queries


def test_nothing_to_do(device, random):
    none = torch.empty(0, dtype=torch.long, device=device)
    assert not question_scores(random(2, 0, 64), random(1, 5, 64), key_spans(none), impl="triton").any()
