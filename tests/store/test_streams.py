"""Streams of requests, and what policies make of them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from ragkv.errors import DocumentError
from ragkv.store.simulation import Request, compare
from ragkv.store.streams import read_passages, zipf_stream


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


@pytest.mark.parametrize("text", ["[1]", '[{"ctxs": [{"title": "x"}]}]', "{}", "no json", '{"context": 3}', "[}"])
def test_what_is_no_dataset(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(DocumentError, match="ctxs"):
        read_passages(file)
