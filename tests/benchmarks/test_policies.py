"""Streams of questions, what policies make of them, what is worth keeping, and the benchmark on a few passages."""

from __future__ import annotations

import json
from collections import Counter
from string import ascii_lowercase

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkv import bundled
from ragkv.errors import DocumentError
from ragkv.report import ChunkReport, FusionReport
from ragkv.store.policy import GDSF, LFU, LRFU, LRU, PGDSF
from tests.scripts import load

streams, units, policies = load("streams"), load("units"), load("policies")
Belady, compare, replay = policies.Belady, policies.compare, policies.replay
Request, read_passages, read_trace, zipf_stream = (
    streams.Request,
    streams.read_passages,
    streams.read_trace,
    streams.zipf_stream,
)
ALL = {"pgdsf", "lrfu", "lru", "lfu", "gdsf", "belady", "popularity"}


def catalogue(count):
    return [Request(number.to_bytes(32, "big"), 1000 + number, 0.1 * (number % 5 + 1)) for number in range(count)]


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
    assert set(results) == ALL
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
    requests = [Request(bytes([number]), 10, 1.0) for number in (1, 2, 3, 4, 1, 2)]
    assert replay(requests, Belady([request.key for request in requests]), 30).hit_rate == 2 / 6
    assert replay(requests, LRU(), 30).hit_rate == 0


@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_nobody_beats_belady_on_equal_sizes(stream, room):
    requests = [Request(bytes([number]), 10, 1.0) for number in stream]
    best = replay(requests, Belady([request.key for request in requests]), room * 10, selective=True).hit_rate
    for policy in (LRU, LFU, GDSF, PGDSF, LRFU):
        for selective in (False, True):
            assert replay(requests, policy(), room * 10, selective=selective).hit_rate <= best + 1e-12


def test_what_is_larger_than_the_tier_is_computed_each_time():
    assert replay([Request(b"k", 11, 1.0)] * 3, LRU(), 10).hit_rate == 0


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


def test_sessions_stay_with_a_topic():
    stream = streams.sessions(range(80), 5000, seed=1)
    assert len(stream) == 5000 and set(stream) <= set(range(80))
    runs = [len(set(stream[start : start + 10])) for start in range(0, 5000, 10)]
    assert sum(runs) / len(runs) < 8  # ten draws of all eighty would be of nine

    assert stream == streams.sessions(range(80), 5000, seed=1) != streams.sessions(range(80), 5000, seed=2)


def test_lrfu_follows_what_is_popular():
    """Beside the policies that it stands between: counts that never age, and the last use alone."""
    saved = {}
    for phases in (1, 5):
        stream = zipf_stream(catalogue(100), 3000, 0.9, seed=2, phases=phases)
        room = sum(request.tokens for request in catalogue(100)) // 8
        saved |= {(kind, phases): replay(stream, kind(), room).saved_s for kind in (PGDSF, LRFU, LRU, LFU)}
    print(saved)
    assert saved[LRFU, 1] > saved[LRU, 1] and saved[LRFU, 5] > saved[LRU, 5]
    assert saved[LRFU, 5] > max(saved[PGDSF, 5], saved[LFU, 5])


def test_gains_are_paired():
    def runs(*shares):
        return [[policies.Outcome(0, 0, 0, share) for share in shares]]

    ((gain, width),) = policies.beyond(runs(0.5, 0.6, 0.7), runs(0.4, 0.5, 0.6))
    assert gain == pytest.approx(0.1) and width == pytest.approx(0, abs=1e-9), "all of it is between the seeds"
    ((gain, width),) = policies.beyond(runs(0.5, 0.7), runs(0.4, 0.4))
    assert gain == pytest.approx(0.2) and width == pytest.approx(12.71 * 0.1)


def test_a_log(tmp_path):
    file = tmp_path / "log.jsonl"
    chunks = [ChunkReport("a.md", "d1", number, 7, "cpu") for number in (3, 4)]
    report = {"fusion": FusionReport("reuse", "sdpa", "reference", 1, 14, 3, chunks=chunks).as_dict()}
    rows = [{"chunks": [["a", 5], ["b", 6]]}, {"question": "?", "report": report}, report, report["fusion"]]
    file.write_text("\n".join(map(json.dumps, [*rows, {"error": {"message": "no"}}, {"chunks": []}])) + "\n\n")
    stream = read_trace(file, lambda tokens: tokens / 10)
    assert [[one.tokens for one in question] for question in stream] == [[5, 6], [7, 7], [7, 7], [7, 7]]
    assert stream[1] == stream[2] == stream[3] and len({one.key for question in stream for one in question}) == 4
    assert stream[0][0].cost_s == 0.5


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"question": "?"}', "line 2"),
        ("[]", "line 2"),
        ('{"chunks": [["a", 0]]}', "at least 1"),
        ('{"chunks": [["a", true]]}', "at least 1"),
        ('{"chunks": [[1, 2]]}', "a key is a text"),
        ('{"chunks": [{"document": "", "number": 0, "tokens": 3}]}', "stands alone"),
    ],
)
def test_what_is_no_log(tmp_path, line, match):
    (tmp_path / "x.jsonl").write_text('{"chunks": [["a", 5]]}\n' + line)
    with pytest.raises(DocumentError, match=match):
        read_trace(tmp_path / "x.jsonl", float)


def test_a_log_without_chunks(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"chunks": []}')
    with pytest.raises(DocumentError, match="no chunks in it"):
        read_trace(tmp_path / "x.jsonl", float)


def questions(*texts):
    return [[Request(letter.encode(), 10, 1.0) for letter in text] for text in texts]


@pytest.mark.parametrize(
    ("unit", "saved"),
    [
        (
            "chunks",
            [0, 10 + 9 + 9, 10 + 9 + 9, 10 + 9 + 9],
        ),  # what stands first is exact, of what is moved a tenth is computed
        (
            "paths",
            [0, 30, 0, 10],
        ),  # one that begins in another way shares nothing, one that ends so shares its beginning
        ("both", [0, 30, 10 + 9 + 9, 10 + 9 + 9]),
    ],
)
def test_what_units_save(unit, saved):
    stream = questions("abc", "abc", "cab", "acb")
    room = 1000
    shares = [units.saved_share(unit, stream[: count + 1], PGDSF(), room, 0.1) * 30 * (count + 1) for count in range(4)]
    assert shares == pytest.approx([sum(saved[: count + 1]) for count in range(4)])


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True), min_size=1, max_size=40),
    st.sampled_from(["chunks", "paths", "both"]),
    st.integers(30, 120),
)
@settings(max_examples=60, deadline=None)
def test_what_others_stand_on_outlives_them(stream, unit, room):
    shelf = units.Shelf(room, LRFU())
    for question in stream:
        shelf.asked.clear()
        units.UNITS[unit](shelf, [Request(bytes([number]), 10, 1.0) for number in question], 0.3)
        assert all(base in shelf._on for on in shelf._on.values() for base in on)
        assert shelf._planner.books.counters.used_bytes <= room


def test_the_benchmark(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    passages = [{"title": name, "text": text} for name, text in bundled.documents().items()]
    data, figures, plot = (tmp_path / name for name in ("data.json", "figures.json", "policies.png"))
    data.write_text(json.dumps([{"ctxs": passages}] * 2))
    argv = ["policies.py", "--dataset", data, "--questions", 120, "--seeds", 2, "--json", figures, "--plot", plot]
    monkeypatch.setattr("sys.argv", list(map(str, argv)))
    policies.main()
    found = json.loads(figures.read_text())
    assert found["passages"] == len(bundled.documents()) and found["mean_tokens"] > 20
    assert found["prefill_seconds"]["0"] == 0 < found["prefill_seconds"]["16"]
    assert found["units"] == {}, "with one passage a question there are no paths"
    for stream in ("stationary", "drifting", "sessions"):
        assert set(found["streams"][stream]) == ALL
        for policy in found["streams"][stream].values():
            assert policy["token_hit_rate"] == sorted(policy["token_hit_rate"])
            assert all(0 <= share < 1 for share in policy["saved_share"])
            assert policy["saved_seconds"][-1] > 0
        assert found["streams"][stream]["belady"]["saved_share_less_pgdsf"][-1]["mean"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.count(": hit rate by tokens") == out.count(": prefill seconds saved") == out.count("of Belady's") == 3
    assert out.count("\nbelady ") == 9


def test_the_benchmark_on_a_model_of_ones_own(tmp_path, monkeypatch):
    priced, profile = streams.pricing("bundled", tmp_path / "not asked for")
    (request,) = priced(["A short passage."])
    assert request.tokens > 2 and request.cost_s == profile(0, request.tokens) > 0


def test_the_benchmark_on_a_log(tmp_path, capsys, monkeypatch):
    log, figures = tmp_path / "log.jsonl", tmp_path / "figures.json"
    log.write_text("\n".join(json.dumps({"chunks": [["a", 50], [str(n % 7), 60]]}) for n in range(60)))
    monkeypatch.setattr("sys.argv", ["policies.py", "--trace", str(log), "--json", str(figures)])
    policies.main()
    found = json.loads(figures.read_text())
    assert (found["passages"], found["questions"], found["seeds"]) == (8, 60, 1)
    assert set(found["streams"]) == {"as it was logged"}
    saved = found["units"]["saved_token_share"]["as it was logged"]
    assert set(saved) == {"pgdsf", "lrfu"} and set(saved["lrfu"]) == {"chunks", "paths", "both"}
    assert saved["pgdsf"]["chunks"][-1][0] > 0
    assert "not computed" in capsys.readouterr().out


class Letters:
    """Embeds a text as the letters in it."""

    name = fingerprint = "letters"
    dimension = 26

    def encode_documents(self, texts):
        return np.stack([self.encode_query(text) for text in texts])

    def encode_query(self, text):
        counts = np.array([text.lower().count(letter) for letter in ascii_lowercase], np.float32)
        return counts / np.linalg.norm(counts)


def test_questions_of_a_data_set(tmp_path):
    """Each is given what is found for it among the passages of all."""
    words = ["harbour", "glacier", "violin", "orchard"]
    rows = [
        {
            "question": f"Where is the {word}?",
            "answers": ["here"],
            "ctxs": [{"title": word, "text": f"The {word} is {n}."}],
        }
        for n, word in enumerate(words)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))

    def priced(texts):
        return [Request(text.encode(), len(text), 1.0) for text in texts]

    found = streams.from_questions(tmp_path / "data.json", 2, priced, Letters())
    assert [len(question) for question in found] == [2] * 4
    assert all(word.encode() in question[0].key for word, question in zip(words, found, strict=True))
