"""Streams of requests, what policies make of them, and the benchmark with the bundled model on a few passages."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkv import bundled
from ragkv.errors import DocumentError
from ragkv.store.policy import GDSF, LFU, LRU, PGDSF

FILE = Path(__file__).parents[2] / "benchmarks" / "policies.py"
spec = importlib.util.spec_from_file_location("benchmarks_policies", FILE)
policies = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # benchmarks/ is not installed
spec.loader.exec_module(policies)
Belady, Request, compare, replay = policies.Belady, policies.Request, policies.compare, policies.replay
read_passages, zipf_stream = policies.read_passages, policies.zipf_stream


def catalogue(count):
    return [
        Request(number.to_bytes(32, "big"), 1000 + number, 10 + number % 7, 0.1 * (number % 5 + 1))
        for number in range(count)
    ]


def test_a_stationary_stream_follows_the_law():
    stream = zipf_stream(catalogue(100), 20_000, 1.0, seed=3)
    counts = [count for _, count in Counter(request.key for request in stream).most_common()]
    assert len(stream) == 20_000
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.25)
    assert stream == zipf_stream(catalogue(100), 20_000, 1.0, seed=3)
    assert stream != zipf_stream(catalogue(100), 20_000, 1.0, seed=4)


def test_a_drifting_stream_forgets_what_was_popular():
    stream = zipf_stream(catalogue(50), 10_003, 1.2, phases=10)
    assert len(stream) == 10_003
    favourites = [
        Counter(request.key for request in stream[start : start + 1000]).most_common(1)[0][0]
        for start in range(0, 10_000, 1000)
    ]
    assert len(set(favourites)) >= 8


def test_policies_are_compared_on_one_stream():
    stream = zipf_stream(catalogue(100), 3000, 0.9)
    results = compare(stream, (0.1, 0.5))
    assert set(results) == {"pgdsf", "lru", "lfu", "gdsf", "belady"}
    for outcomes in results.values():
        assert 0 < outcomes[0].token_hit_rate < outcomes[1].token_hit_rate < 1
        assert 0 < outcomes[0].saved_s < sum(request.cost_s for request in stream)
    assert max(results, key=lambda name: results[name][0].hit_rate) == "belady"
    assert results["pgdsf"][0].saved_s > results["gdsf"][0].saved_s, "it knows what passages cost"


def test_datasets(tmp_path):
    file = tmp_path / "musique.json"
    file.write_text(json.dumps([{"ctxs": [{"title": "One", "text": "1"}, {"title": "Two", "text": "2"}]}]))
    assert read_passages(file) == ["One 1", "Two 2"]
    file = tmp_path / "long.jsonl"
    rows = [{"context": "Passage 1:\nA\n\nmore\nPassage 2:\nB"}, {"context": "first\n\nsecond"}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_passages(file) == ["Passage 1:\nA\n\nmore", "2:\nB", "first", "second"]


def test_belady_keeps_what_is_needed_first():
    requests = [Request(bytes([number]), 10, 1, 1.0) for number in (1, 2, 3, 4, 1, 2)]
    assert replay(requests, Belady([request.key for request in requests]), 30).hit_rate == 2 / 6
    assert replay(requests, LRU(), 30).hit_rate == 0


@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_nobody_beats_belady_on_equal_sizes(stream, room):
    requests = [Request(bytes([number]), 10, 1, 1.0) for number in stream]
    best = replay(requests, Belady([request.key for request in requests]), room * 10, selective=True).hit_rate
    for policy in (LRU, LFU, GDSF, PGDSF):
        for selective in (False, True):
            assert replay(requests, policy(), room * 10, selective=selective).hit_rate <= best + 1e-12


def test_what_is_larger_than_the_tier_is_computed_each_time():
    assert replay([Request(b"k", 11, 1, 1.0)] * 3, LRU(), 10).hit_rate == 0


@pytest.mark.parametrize("text", ["[1]", '[{"ctxs": [{"title": "x"}]}]', "{}", "no json", '{"context": 3}', "[}"])
def test_what_is_no_dataset(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(DocumentError, match="ctxs"):
        read_passages(file)


def test_no_passages(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DocumentError, match="no passages in it"):
        read_passages(tmp_path / "x.json")


def test_the_benchmark(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    passages = [{"title": name, "text": text} for name, text in bundled.documents().items()]
    data, figures, plot = (tmp_path / name for name in ("data.json", "figures.json", "policies.png"))
    data.write_text(json.dumps([{"ctxs": passages}] * 2))
    argv = ["policies.py", "--dataset", data, "--requests", 500, "--seeds", 2, "--json", figures, "--plot", plot]
    monkeypatch.setattr("sys.argv", list(map(str, argv)))
    policies.main()
    found = json.loads(figures.read_text())
    assert found["passages"] == len(bundled.documents()) and found["mean_tokens"] > 20
    assert found["prefill_seconds"]["0"] == 0 < found["prefill_seconds"]["16"]
    for stream in ("stationary", "drifting"):
        assert set(found["streams"][stream]) == {"pgdsf", "lru", "lfu", "gdsf", "belady"}
        for policy in found["streams"][stream].values():
            assert policy["token_hit_rate"] == sorted(policy["token_hit_rate"])
            assert all(0 <= share < 1 for share in policy["saved_share"])
            assert policy["saved_seconds"][-1] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.count(": hit rate by tokens") == out.count(": prefill seconds saved") == 2
    assert out.count("\nbelady ") == 4
