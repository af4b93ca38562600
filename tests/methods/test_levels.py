"""Lossy levels of a pool: taken where a first token is wanted sooner than anything exact is there, the best that comes in time."""

from dataclasses import replace

import pytest
import torch

from ragkv import Auto, CacheBlend, Engine, PromptTemplate, SensitiveTokens, TieredStore, gate
from ragkv.chunk import Chunk
from ragkv.errors import ArgumentError
from ragkv.fusing import to_load
from ragkv.fusion.layout import lay_out
from ragkv.fusion.view import View
from ragkv.methods.weighing import weighed
from ragkv.store import CostProfile, Loading, Rates, RemoteTier
from ragkv.store.rates import LevelRate
from ragkv.store.remote.levels import LEVELS
from ragkv.testing import random_ids, tiny_model

TOKEN_BYTES = 1000.0
RATES = tuple(LevelRate(name, share * TOKEN_BYTES) for name, share in (("fine", 0.4), ("medium", 0.3), ("coarse", 0.2)))
#: Four milliseconds a token: computing all of four chunks of 100 and a question of 20 takes 1.7 s.
COSTS = CostProfile((0, 1000), (0, 1000), ((0.0, 4.0), (0.0, 4.0)))
LAYOUT = lay_out((0,), (), [Chunk((number,) * 100) for number in range(4)], (0,) * 20, torch.device("cpu"))


class Pooled(View):
    """All chunks lie in a pool; asking it takes half a second."""

    elapsed_s = 0.0

    @property
    def tiers(self):
        self.elapsed_s = 0.5
        return ["remote"] * 4


def chosen(limit_s, bytes_per_s, levels=RATES):
    rates = Rates(COSTS, {"remote": Loading(bytes_per_s, TOKEN_BYTES, 0.0, True, levels)})
    return weighed(SensitiveTokens(), Pooled(LAYOUT, 1), rates, 0.5 + limit_s)


def test_none_where_something_exact_is_in_time():
    for limit_s in (10.0, float("inf")):
        found = chosen(limit_s, 1e6)
        assert not found.levels and "pool" not in found.why
    assert chosen(10.0, 1e6) == chosen(float("inf"), 1e6)


def test_the_best_that_comes_in_time():
    """Loading all takes a second; what is computed besides 0.24 s, so that nothing is there before 0.44."""
    loss, names = -1, []
    for limit_s in (1.3, 1.0, 0.85, 0.7, 0.6, 0.5, 0.45, 0.1, -1.0):
        found = chosen(limit_s, 4e5)
        now = sum(1 + [each.name for each in RATES].index(level) for level in found.levels.values())
        assert found.reckoned["chosen"] <= limit_s * 1e3 or limit_s < 0.4, (limit_s, found)
        names.append(sorted(set(found.levels.values())))
        if not found.computed:
            assert now >= loss, "the less time, the coarser"
            loss = now
    assert names[0] == [] and names[-1] == ["coarse"] and any(len(each) == 2 for each in names), names


def test_no_worse_than_it_must_be():
    """One step better for any chunk, and it is late."""
    found = chosen(0.55, 4e5)
    assert found.levels and not found.computed
    ranks = ["", *(each.name for each in RATES)]
    seconds = {"": TOKEN_BYTES / 4e5, **{each.name: each.token_bytes / 4e5 for each in RATES}}
    took = found.reckoned["chosen"] / 1e3
    for level in found.levels.values():
        assert took + 100 * (seconds[ranks[ranks.index(level) - 1]] - seconds[level]) > 0.55


def test_a_chunk_that_is_computed_takes_its_share_of_the_recompute_along():
    """Also the first one, in front of which no other stands: its 100 tokens, a tenth of 300 others, and the question's 20."""
    found = chosen(0.6, 4e5)
    assert found.computed == {0} and found.reckoned["chosen"] == pytest.approx(4.0 * 150)


def test_computing_where_that_is_faster_than_the_coarsest():
    found = chosen(0.1, 1e3)
    assert found.method is None and not found.levels and len(found.computed) == 4
    half = chosen(0.8, 6e4, RATES[2:])  # some are computed, and exact; the others come coarse
    assert half.levels and half.computed and half.reckoned["chosen"] < chosen(float("inf"), 6e4).reckoned["chosen"]
    assert half.levels.keys().isdisjoint(half.computed)


def test_decoding_is_reckoned():
    slow = tuple(level._replace(token_s=1.0) for level in RATES)
    assert not chosen(0.1, 4e5, slow).levels, "it takes longer to decode than the bytes that it saves"


def test_without_levels_a_limit_changes_nothing():
    assert chosen(0.1, 4e5, ()) == chosen(float("inf"), 4e5, ())


@pytest.mark.parametrize("ttft_s", [0, -1.0])
def test_a_time_that_is_none(ttft_s):
    with pytest.raises(ArgumentError, match="ttft_s"):
        Auto(ttft_s=ttft_s)


TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10])
QUESTION = random_ids(9)


@pytest.fixture
def machines(tmp_path):
    """One that has filled a pool with all levels, its chunks out of order, and others that have it; figures by which it is slow."""
    model, url, opened = tiny_model(), f"memory://{tmp_path}", []

    def make(**options):
        store = TieredStore(tmp_path / f"{len(opened)}", cpu_bytes=0, remote=RemoteTier(url, levels=tuple(LEVELS)))
        opened.append(Engine(model, template=TEMPLATE, store=store, **options))
        return opened[-1]

    one = make()
    parts = [random_ids(64, seed=number) for number in range(4)]
    chunks = [chunk for pair in (parts[:2], parts[2:]) for chunk in one.add_document(pair)]
    one.store.flush()
    yield one, chunks[2:] + chunks[:2], make
    for engine in opened:
        engine.close()


def figures(engine):
    """A second a token to compute; ten tokens a second over the network, of the coarsest level forty."""
    size = 2 * sum(spec.heads * spec.key_dim * spec.dtype.itemsize for spec in engine.decoder.specs)
    levels = tuple(LevelRate(name, level.share * size) for name, level in LEVELS.items())
    costs = CostProfile((0, 1000), (0, 1000), ((0.0, 1000.0), (0.0, 1000.0)))
    return Rates(costs, {"remote": Loading(10 * size, size, 0.0, True, levels)})


def test_a_prompt_in_a_hurry_says_what_it_took(machines):
    one, chunks, make = machines
    rates = figures(one)
    two = make()
    exact = one.fuse(chunks, QUESTION, method=SensitiveTokens(0.2))
    layout = lay_out((1, 5, 6), (), chunks, QUESTION, torch.device("cpu"))
    hurried = Auto(SensitiveTokens(0.2), rates, ttft_s=1.0)
    assert to_load(two.documents, layout, hurried) == []
    prompt = two.fuse(chunks, QUESTION, method=hurried)
    report = prompt.report
    assert report.hits == {"remote": 4} and [chunk.level for chunk in report.chunks] == ["coarse"] * 4
    assert "4 at coarse of the pool" in report.why and report.as_dict()["chunks"][0]["level"] == "coarse"
    assert 0 < float((prompt.logits - exact.logits).abs().max()) < 1, "near, and not the same"
    assert len(two.store) == 0, "it is not kept as what was stored"
    calm = two.fuse(chunks, QUESTION, method=replace(hurried, ttft_s=1e6))
    assert [chunk.level for chunk in calm.report.chunks] == [""] * 4
    torch.testing.assert_close(calm.logits, exact.logits, atol=1e-5, rtol=1e-5)  # it is computed as its chunks come


def test_nothing_is_kept_of_a_path_behind_what_is_lossy(machines):
    one, chunks, make = machines
    two = make(paths=True)
    report = two.fuse(chunks, QUESTION, method=Auto(SensitiveTokens(0.2), figures(one), ttft_s=1.0)).report
    assert [chunk.level for chunk in report.chunks] == [""] * 4 and "of the pool" not in report.why


def test_a_method_that_looks_at_what_is_stored_is_shown_that(machines):
    """And where it had nothing to choose, the report names no levels either."""
    one, chunks, make = machines
    for order in (chunks, chunks[2:]):
        report = make().fuse(order, QUESTION, method=Auto(CacheBlend(0.2), figures(one), ttft_s=1.0)).report
        assert {chunk.level for chunk in report.chunks} == {""} and "of the pool" not in report.why


def test_chunks_that_stand_where_they_were_read_are_not_exact_at_a_lossy_level(machines):
    """The gate checks them."""
    one, chunks, make = machines
    two, method = make(), Auto(rates=figures(one), ttft_s=1.0)
    order = chunks[2:]
    layout = lay_out((1, 5, 6), (1, 5, 6), order, QUESTION, torch.device("cpu"))
    assert all(placed.exact for placed in layout.chunks)
    hurried, calm = (two.fuse(order, QUESTION, method=replace(method, ttft_s=seconds)) for seconds in (1.0, 1e6))
    assert hurried.report.method == calm.report.method == "Reuse()"
    assert not gate._exact(hurried, layout) and gate._exact(calm, layout)
