"""No step in fixed shapes waits for the device: run on a CPU under a mode that raises where a GPU would be waited for."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from ragkv import CacheBlend, Engine, LegoLink, PromptTemplate, RelevantTokens, Reuse
from ragkv.model.syncs import HostSyncError, no_syncs
from ragkv.testing import random_ids, tiny_model

CPU, GIVEN = torch.device("cpu"), torch.arange(6)
WAITS = {
    "_local_scalar_dense": [
        lambda: GIVEN.sum().item(),
        lambda: int(GIVEN[0]),
        lambda: bool(GIVEN[0] > 1),
        lambda: GIVEN[: GIVEN[1]],
    ],
    "tolist": [lambda: GIVEN.tolist()],
    "cpu": [lambda: GIVEN.cpu()],
    "numpy": [lambda: GIVEN.numpy()],
    "nonzero": [lambda: GIVEN.nonzero(), lambda: torch.where(GIVEN > 2)],
    "index": [lambda: GIVEN[GIVEN > 2]],
    "index_put_": [lambda: GIVEN.clone().index_put_((GIVEN > 2,), torch.tensor(0))],
    "masked_select": [lambda: GIVEN.masked_select(GIVEN > 2)],
    "_unique2": [lambda: torch.unique(GIVEN)],
    "isin": [lambda: torch.isin(GIVEN, GIVEN[:2])],
    "bincount": [lambda: torch.bincount(GIVEN)],
    "tensor": [lambda: torch.tensor([1.0], device=GIVEN.device)],
    "as_tensor": [lambda: torch.as_tensor([1.0], device=CPU)],
    "equal": [lambda: torch.equal(GIVEN, GIVEN.clone())],
    "repeat_interleave": [lambda: torch.repeat_interleave(GIVEN)],
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_refused(name):
    for wait in WAITS[name]:
        with pytest.raises(HostSyncError, match=f"^{name}"), no_syncs(CPU):
            wait()
        wait()  # behind the block it is as before


def test_what_stays_on_the_device_is_not():
    with no_syncs(CPU):
        picked = GIVEN[torch.tensor([2, 1], device="cpu")] + GIVEN[1:3]
        torch.where(GIVEN > 2, GIVEN, 0).topk(2)
        torch.zeros(6).index_copy_(0, GIVEN, torch.ones(6)).masked_fill_(GIVEN > 1, 0.0)
    assert len(picked) == 2


def test_what_crosses_to_a_device_is_refused():
    """A graph would copy from memory of the host that is long gone."""
    there = torch.empty(6, dtype=torch.long, device="meta")
    with pytest.raises(HostSyncError, match="_to_copy"), no_syncs(there.device):
        GIVEN.to("meta")
    with pytest.raises(HostSyncError, match="copy_"), no_syncs(there.device):
        there.copy_(GIVEN)
    with no_syncs(there.device):
        there.copy_(there + there.to(torch.int32))


def test_experts_in_bf16_alone_have_a_kernel():
    offsets = torch.tensor([2, 4], dtype=torch.int32, device="meta")
    for dtype, waits in ((torch.float32, True), (torch.bfloat16, False)):
        rows = torch.empty(4, 16, dtype=dtype, device="meta")
        weights = torch.empty(2, 16, 16, dtype=dtype, device="meta")
        with pytest.raises(HostSyncError, match="_grouped_mm") if waits else nullcontext(), no_syncs(rows.device):
            torch._grouped_mm(rows, weights, offs=offsets)


def test_other_devices_are_not_looked_at():
    with no_syncs(torch.device("meta")):
        assert GIVEN.sum().item() == 15 and GIVEN.tolist() == [0, 1, 2, 3, 4, 5]


@contextmanager
def watched(engine, monkeypatch):
    """Every forward runs under the mode, from its rows to its logits; yields how each ran."""
    graphs, ran = engine.documents.steps.graphs, []
    forward = graphs.forward

    def watch(rows):
        with no_syncs(CPU):
            logits = forward(rows)
        ran.append(rows.ran)
        return logits

    with monkeypatch.context() as patched:
        patched.setattr(graphs, "forward", watch)
        yield ran


@pytest.fixture
def engine():
    return Engine(tiny_model(), template=PromptTemplate(prefix=[1, 5]), kernels="reference", graphs=True)


def ask(engine, method):
    chunks = engine.add([random_ids(n) for n in (21, 33)])[::-1]
    return engine.generate(chunks, random_ids(4), method=method, max_new_tokens=5, eos_token_id=None)


@pytest.mark.parametrize("method", [LegoLink(3), CacheBlend(0.3), Reuse(), RelevantTokens(0.2)])
def test_a_warm_pass_and_warm_tokens_wait_for_nothing(engine, method, monkeypatch):
    want = ask(engine, method)
    with watched(engine, monkeypatch) as ran:
        assert ask(engine, method).token_ids == want.token_ids
    assert ran == ["fixed"] * (6 if method == RelevantTokens(0.2) else 5)  # it looks before


def test_a_wait_in_the_model_would_show(engine, monkeypatch):
    ask(engine, Reuse())
    layer = engine.model.model.layers[2].mlp
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda hidden: forward(hidden) * float(hidden.abs().max().item() > 0))
    with watched(engine, monkeypatch), pytest.raises(HostSyncError, match="_local_scalar_dense"):
        ask(engine, Reuse())
