"""One case in one order: what each arm reads, what it is charged, and what its rows say."""

import pytest
import torch

from ragkv import FullPrefill, PromptTemplate, Reuse, bundled
from ragkv.evaluation import Bench, metrics, parse_arms
from ragkv.evaluation.asking import Prompt, Task, ask
from ragkv.evaluation.scoring import Group
from ragkv.model.packing import run_packed
from ragkv.testing import tiny_model

ARMS = parse_arms(
    [
        *("full-prefill", "full-documents", "gold-only", "no-context", "reuse", "no-rotation", "prefix-only@alone"),
        *("cache-blend:ratio=0.15@alone", "lego-link@alone"),
        *("random=cache-blend:ratio=0.15@alone", "random=lego-link@alone"),
    ],
    [0.2],
)
RETRIEVED = ((0, 0), (2, 0), (1, 2), (1, 0))  # not all of their documents, and not in their order


@pytest.fixture(scope="module")
def bench(loaded):
    return Bench(tiny_model(vocab_size=1792), loaded[1], PromptTemplate(**bundled.TEMPLATE), max_new_tokens=4)


@pytest.fixture(scope="module")
def case(small_case):
    return small_case(retrieved=RETRIEVED)


@pytest.fixture(scope="module")
def reading(bench, case):
    return bench.read(case)


@pytest.fixture(scope="module")
def rows(bench, case, reading):
    return {row["arm"]: row for row in Group(bench, case, 0, reading).rows(ARMS)}


def test_every_arm_has_a_row(rows, case):
    assert rows.keys() == {arm.name for arm in ARMS}
    assert not any("refused" in row for row in rows.values())
    assert {row["fingerprint"] for row in rows.values()} == {case.fingerprint}
    assert {row["document"] for row in rows.values()} == {case.about} != {case.id}


@pytest.mark.parametrize("max_new_tokens", [6, 0])
def test_rows_are_the_same_one_by_one(loaded, case, monkeypatch, max_new_tokens):
    """Prompts that are answered side by side share their forwards; that changes nothing but the times."""
    model = tiny_model(vocab_size=1792, initializer_range=0.2)
    bench = Bench(model, loaded[1], PromptTemplate(**bundled.TEMPLATE), max_new_tokens=max_new_tokens)
    reading, together, found = bench.read(case), [], []

    def counted(decoder, parts):
        together.append(len(parts))
        return run_packed(decoder, parts)

    assert bench.engine.runner.steps().packs
    monkeypatch.setattr("ragkv.evaluation.answering.run_packed", counted)
    for at_once in (3, 1):
        monkeypatch.setattr("ragkv.evaluation.scoring._AT_ONCE", at_once)
        found.append({row["arm"]: row for row in Group(bench, case, 0, reading).rows(ARMS)})
        assert max(together) == 3 if at_once == 3 else set(together) == {2}, "the references alone go side by side"
        together.clear()
    for arm, row in found[0].items():
        other = found[1][arm]
        assert row.pop("gold_nll") == pytest.approx(other.pop("gold_nll"), rel=1e-5)
        for timed in ("ttft_ms", "stages"):
            del row[timed], other[timed]
        assert row == other
    assert len({row.get("answer") for row in found[0].values()}) >= (3 if max_new_tokens else 1)


def test_which_chunks_an_arm_reads(rows, bench, case):
    asked = {"full-documents": case.whole, "gold-only": case.gold, "no-context": ()}
    for arm, row in rows.items():
        assert row["tokens"] == bench.tokens(case, asked.get(arm, RETRIEVED)), arm
    same = {row["ids"] for arm, row in rows.items() if arm not in asked}
    assert len(same) == 1 and not same & {rows[arm]["ids"] for arm in asked}


def test_arms_are_held_against_both_full_prefills(rows, bench, case, reading):
    def logits(places, context, method):
        return bench.fuse(reading.at(places, context), case, method)[0].logits

    references = {
        "chunks": logits(RETRIEVED, "document", FullPrefill()),
        "documents": logits(case.whole, "document", FullPrefill()),
    }
    for context in ("alone", "document"):
        got, row = logits(RETRIEVED, context, Reuse()), rows[f"reuse@{context}"]
        for name, reference in references.items():
            assert row[f"kl_{name}"] == pytest.approx(metrics.divergence(reference, got), rel=1e-3)
            assert row[f"top1_{name}"] == metrics.same_top(reference, got)
    assert rows["reuse@alone"]["kl_chunks"] != rows["reuse@document"]["kl_chunks"]
    for arm, name in (("full-prefill", "chunks"), ("full-documents", "documents")):
        assert (rows[arm][f"kl_{name}"], rows[arm][f"top1_{name}"], rows[arm][f"same_{name}"]) == (0, 1, 1)
    assert rows["full-prefill"]["kl_documents"] > 0 < rows["full-documents"]["kl_chunks"]


def test_a_random_control_is_charged_what_it_is_like(rows, bench, case):
    tokens = rows["full-prefill"]["tokens"] - bench.tokens(case, ())
    for like in ("cache-blend:ratio=0.15@alone", "lego-link:k=20%@alone"):
        assert rows[f"random={like}"]["budget"] == pytest.approx(rows[like]["budget"], abs=1 / tokens)
        assert rows[f"random={like}"]["method"].startswith("Random(")


def test_budgets_are_charged_without_the_suffix(rows, bench, case):
    lengths = [len(bench.engine.encoder.chunk(case.text(place))) for place in RETRIEVED]
    assert rows["full-prefill"]["budget"] == rows["no-context"]["budget"] + 1 == 1
    assert rows["prefix-only@alone"]["budget"] == pytest.approx(sum(lengths[1:]) / sum(lengths))  # the first is exact
    first = round(0.2 * sum(lengths) / len(lengths))
    assert rows["lego-link:k=20%@alone"]["budget"] == pytest.approx(3 * first / sum(lengths))


def test_without_rotation_keys_stay_as_they_were_made(bench, case, reading):
    chunk = reading.at(RETRIEVED, "alone")[2]
    made = bench.engine.store.get(bench.engine.documents.key(chunk))
    for rotated in (False, True):
        prompt, _ = bench.fuse(reading.at(RETRIEVED, "alone"), case, Reuse(), rotated)
        start = prompt.report.prefix_tokens + sum(len(c) for c in reading.at(RETRIEVED[:2], "alone"))
        layer = prompt.past_key_values.layers[1]
        placed = (layer.keys[0, :, start : start + len(chunk)], layer.values[0, :, start : start + len(chunk)])
        assert torch.equal(placed[0], made.keys[1]) != rotated
        assert torch.equal(placed[1], made.values[1])


def test_the_text_to_measure_sensitivity_with(bench, loaded, case):
    """Every bench of a run is given it, those for times too."""
    model, words = bench.engine.model, loaded[1]
    own = Bench(model, words, bench.engine.template, max_new_tokens=4, foreign="Rivers and harps, and what they cost.")
    found = []
    for made in (bench, own, own.like()):
        chunk = made.read(case).at(RETRIEVED, "document")[2]
        found.append(made.engine.store.get(made.engine.documents.key(chunk)).sensitivity)
    assert not torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_documents_are_read_once_for_all_cases_that_share_them(tiny_bench, small_case, monkeypatch):
    """Alone what was retrieved, where an arm asks for it; until much is kept, then each case's are dropped."""
    cases = [small_case("a", retrieved=((0, 1), (1, 1))), small_case("b", retrieved=((1, 1), (1, 2)))]

    def asked(*words):
        read, arms = list[int](), parse_arms(words, [0.1])
        for case in cases:
            before = tiny_bench.engine.store.stats().puts
            assert len(list(ask(tiny_bench, Task(case, [Prompt(0, case, arms, {})], 0)))) == len(arms)
            read.append(tiny_bench.engine.store.stats().puts - before)
        return read

    assert asked("full-prefill", "reuse@document") == [5, 0]
    assert asked("reuse@alone") == [2, 1]
    monkeypatch.setattr("ragkv.evaluation.bench._KEPT_BYTES", 0)
    assert asked("reuse@alone") == [0, 4] and not len(tiny_bench.engine.store)
