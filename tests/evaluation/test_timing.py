"""What a prompt costs when nothing is in memory, and the memory that it takes."""

import sys
from pathlib import Path

import pytest
import torch

from ragkv.evaluation import parse_arms
from ragkv.evaluation.timing import Clock, Peak

ARMS = parse_arms(["full-prefill", "gold-only", "reuse", "cache-blend:check_layer=9@alone", "random=reuse@alone"], [])


def test_cold_prompts_read_their_documents_and_warm_ones_come_from_disk(tiny_bench, small_case):
    case = small_case(gold=(), retrieved=((0, 1), (1, 0)))
    with Clock(tiny_bench) as clock:
        times = clock.times(case, ARMS, {})
        assert all(len(bench.engine.store) == 0 for bench in (clock._memory, clock._disk, clock._cold))
        folder = clock._disk.engine.store.path
        assert folder.exists()
    assert not folder.exists()
    # Without gold chunks, on a model with 4 layers, and where nobody was charged: these cannot be timed.
    assert times.keys() == {"full-prefill", "reuse@alone", "reuse@document"}
    full, alone, document = times["full-prefill"], times["reuse@alone"], times["reuse@document"]
    assert (full["cold_read_ms"], full["bytes_read"]) == (0, 0)
    config, tokens = (
        tiny_bench.engine.model.config,
        tiny_bench.tokens(case, case.retrieved) - tiny_bench.tokens(case, ()),
    )
    size = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for reused in (alone, document):
        assert 0 < reused["cold_read_ms"] < reused["cold_ms"] and 0 <= reused["disk_place_ms"] < reused["disk_ms"]
        assert tokens * size <= reused["bytes_read"] < 2 * tokens * size
        assert reused["kv_bytes"] == tiny_bench.tokens(case, case.retrieved) * size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_the_peak_is_what_was_taken_and_given_back():
    with Peak(torch.device("cpu")) as peak:
        torch.ones(16 << 20)  # 64 MiB
    assert 60 << 20 < peak.bytes < 160 << 20
    with Peak(torch.device("cpu")) as after:
        pass
    assert after.bytes < 8 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_a_process_may_be_called_anything():
    """A script's name is cut after 15 bytes, in the middle of a letter too."""
    name = Path("/proc/self/comm")
    before = name.read_bytes()
    name.write_bytes("fråga-på-svenska".encode()[:11] + b"\xc3")
    try:
        with Peak(torch.device("cpu")) as peak:
            pass
    finally:
        name.write_bytes(before)
    assert peak.bytes is not None
