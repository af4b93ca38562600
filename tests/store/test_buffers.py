"""Memory for payloads: pinned where that is of use, counted as it is taken."""

from __future__ import annotations

import pytest
import torch

from ragkv.store import TieredStore, buffers
from ragkv.store.payload import Payload


@pytest.fixture
def pinned(monkeypatch):
    """As on a machine with a GPU, whose memory for it is like any other; the sizes that were pinned."""
    empty, sizes = torch.empty, []

    def allocated(*shape, pin_memory=False, **more):
        sizes.extend(shape if pin_memory else ())
        return empty(*shape, **more)

    monkeypatch.setattr(torch, "empty", allocated)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return sizes


@pytest.fixture
def computing(pinned, monkeypatch):
    """As if this process computed on it."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return pinned


@pytest.mark.parametrize(("size", "takes"), [(1, 1), (4, 4), (5, 8), (34 << 20, 64 << 20), (64 << 20, 64 << 20)])
def test_pinned_memory_is_counted_in_powers_of_two(computing, size, takes):
    assert Payload(size).taken_bytes == buffers.taken(size) == takes and computing == [size]


@pytest.mark.parametrize(
    ("settings", "takes"),
    [
        ("", 8 << 20),
        ("pinned_max_round_threshold_mb:1", 5 << 20),
        ("expandable_segments:True, pinned_max_round_threshold_mb:5", 8 << 20),
        ("pinned_max_round_threshold_mb:64,pinned_max_cached_size_mb:2", 5 << 20),
    ],
)
def test_pytorch_may_be_told_to_pin_what_is_asked_for(computing, monkeypatch, settings, takes):
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: settings, raising=False)
    assert buffers.taken(5 << 20) == takes


def test_a_pytorch_that_cannot_be_told_rounds(computing, monkeypatch):
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings", raising=False)
    assert buffers.taken(5 << 20) == 8 << 20


@pytest.mark.parametrize("disk", [False, True])
def test_what_is_pinned_stays_within_the_budget(computing, folder, kv, key, disk):
    """Each of the chunks is a little more than a power of two."""
    size = kv(0, tokens=90).nbytes
    with TieredStore(folder if disk else None, cpu_bytes=8 * size, policy="lru") as store:
        for number in range(20):
            store.put(key(number), kv(number, tokens=90))
        stats = store.stats()
        assert (
            stats.entries["cpu"] == 4
            and stats.bytes["cpu"] == 4 * buffers.taken(size) <= 8 * size < 2 * stats.bytes["cpu"]
        )
        assert store.sizes([key(19)])["cpu"] == buffers.taken(size)


@pytest.mark.parametrize("size", [100, 2 << 20])
def test_a_process_that_computes_on_no_gpu_pins_nothing(pinned, size):
    """That would make a context on it; in a forked child it would raise."""
    assert len(Payload(size).data) == size and not pinned


@pytest.mark.parametrize("size", [100, 2 << 20])
def test_what_cannot_be_pinned_is_not(monkeypatch, caplog, size):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    payload = Payload(size)  # there is no GPU
    assert (len(payload.data), payload.taken_bytes) == (size, size) and "not pinned" in caplog.text
