"""What a machine does with a model: measured once, kept beside the KV, and never at a question."""

import os
import time
from dataclasses import replace

import pytest
import torch

from ragkv import Engine, PromptTemplate, TieredStore
from ragkv.errors import ArgumentError, StoreError
from ragkv.library.loading import Sample
from ragkv.library.rates import known_rates, measured_rates
from ragkv.model.cache import LayerSpec, random_kv
from ragkv.model.decoder import Decoder
from ragkv.store import CostProfile, Loading, Rates
from ragkv.store.rates import PAGE_CACHE
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6])
COSTS = CostProfile((0, 1000), (0, 1000), ((0.0, 1.0), (0.0, 1.5)))

GRID = CostProfile((0, 1000), (0, 16, 64, 256), ((0.0, 0.1, 0.2, 0.3), (0.0, 0.2, 0.3, 0.4)))


pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def open_engine(model, path, **options):
    return Engine(model, template=TEMPLATE, store=TieredStore(path, **options))


def forbidden(*_, **__):
    raise AssertionError("it was measured before")


def test_every_tier_is_measured_through_the_stores_own_path(model, tmp_path):
    with open_engine(model, tmp_path) as engine:
        engine.store.put(bytes(32), engine.documents.reader.anchor)
        before, history = engine.store.stats(), len(engine.store)
        rates = measured_rates(engine.documents, limit_s=1000)
        assert list(rates.tiers) == ["cpu", "disk", PAGE_CACHE] and not rates.beside
        for tier in rates.tiers.values():
            assert tier.bytes_per_s > 0 and tier.start_s >= 0
        numbers = sum(spec.heads * (spec.key_dim + spec.value_dim) * 4 for spec in engine.decoder.specs)
        assert rates.tiers["cpu"].token_bytes == numbers <= rates.tiers["disk"].token_bytes < 1.5 * numbers
        assert len(rates.costs.new) > 3, "prefill at three lengths"
        after = engine.store.stats()
        assert (after.entries, after.hits, len(engine.store)) == (before.entries, before.hits, history)
    assert sorted(os.listdir(tmp_path)) == ["data.mdb", "lock.mdb"], "the sample is gone"


def test_measured_once_for_a_folder(model, tmp_path, monkeypatch):
    with open_engine(model, tmp_path) as engine:
        assert known_rates(engine.documents) is None
        advice = engine.advise()
        assert known_rates(engine.documents) is advice.rates
    monkeypatch.setattr("ragkv.library.costs.measure", forbidden)
    monkeypatch.setattr("ragkv.library.costs._measured", {})
    monkeypatch.setattr("ragkv.library.rates.measure_loading", forbidden)
    with open_engine(model, tmp_path) as engine:
        assert engine.advise().rates == advice.rates == known_rates(engine.documents)
        with pytest.raises(AssertionError, match="measured before"):
            engine.advise(again=True)
    with open_engine(model, tmp_path, codec="int8") as engine:
        assert known_rates(engine.documents) is None, "how KV are encoded is a part of it"
    with open_engine(tiny_model(seed=1), tmp_path) as engine:
        assert known_rates(engine.documents) is None, "another model"
    with Engine(model, template=TEMPLATE, store=TieredStore(tmp_path), kernels="reference") as engine:
        assert known_rates(engine.documents) is None, "other kernels"
    for figures in ("costs", "rates"):
        with monkeypatch.context() as patched, open_engine(model, tmp_path) as engine:
            patched.setattr(f"ragkv.library.{figures}.machine", lambda device: "another")
            assert known_rates(engine.documents) is None, "another machine"


def test_there_is_one_grid(model, tmp_path, monkeypatch, facts):
    """The eviction policy's: what adding documents measured is not measured again."""
    with open_engine(model, tmp_path) as engine:
        monkeypatch.setattr("ragkv.library.costs.measure", lambda *_: GRID)
        engine.add([random_ids(9)])
        (name,) = [name for name in facts(engine.store) if name.startswith("prefill seconds:")]
        monkeypatch.setattr("ragkv.library.costs.measure", forbidden)
        assert engine.advise().rates.costs == CostProfile.from_bytes(engine.store.meta_get(name)) == GRID


def test_a_grid_of_too_few_lengths_is_measured_again(model, tmp_path, monkeypatch):
    """One that was made in little time, when a document was added."""
    with open_engine(model, tmp_path) as engine:
        monkeypatch.setattr("ragkv.library.costs.measure", lambda *_: COSTS)
        engine.add([random_ids(9)])
        monkeypatch.setattr("ragkv.library.costs.measure", lambda *_: GRID)
        assert engine.advise().rates.costs == GRID


def test_a_damaged_figure_is_measured_again(model, tmp_path, facts):
    with open_engine(model, tmp_path) as engine:
        engine.advise()
        (name,) = [name for name in facts(engine.store) if name.startswith("loading:")]
    for wrong in (b"{}x", b"[1]", b'{"disk": [1]}', b'{"disk": [0, 1, 0]}', b'{"disk": ["fast", 1, 0]}'):
        with open_engine(model, tmp_path) as engine:
            engine.store.meta_put(name, wrong)
            assert known_rates(engine.documents) is None
    with open_engine(model, tmp_path) as engine:
        assert set(engine.advise().rates.tiers) == {"cpu", "disk", PAGE_CACHE}


def test_memory_alone_and_folders_for_reading(model, tmp_path, caplog):
    with open_engine(model, None) as engine:
        assert list(engine.advise().rates.tiers) == ["cpu"]
    open_engine(model, tmp_path).close()
    with open_engine(model, tmp_path, readonly=True) as engine:
        assert list(engine.advise().rates.tiers) == ["cpu"]
        assert "used but not stored" in caplog.text
    for limit in (0, -1.0, "soon", float("nan")):
        with pytest.raises(ArgumentError, match="limit_s must be seconds above 0"):
            engine.advise(limit_s=limit)


def test_measuring_is_bounded(model, tmp_path, monkeypatch):
    """Where time is up, two chunks of the sample are stored, and no more."""
    put, stored = TieredStore.put_many, []

    def counted(store, items, **more):
        stored.append((store.path is not None and store.path != tmp_path, len(items)))
        return put(store, items, **more)

    with open_engine(model, tmp_path) as engine:
        monkeypatch.setattr(TieredStore, "put_many", counted)
        engine.advise(limit_s=1e-9)
    assert sum(count for on_disk, count in stored if on_disk) == 2


def test_what_a_killed_process_left_goes(model, tmp_path):
    """And not what another one is measuring with."""
    with open_engine(model, tmp_path) as engine:
        for name, age_s in (("measuring-old", 7200), ("measuring-new", 60)):
            (tmp_path / name).mkdir()
            os.utime(tmp_path / name, (time.time() - age_s,) * 2)
        engine.advise(limit_s=0.1)
    assert sorted(os.listdir(tmp_path)) == ["data.mdb", "lock.mdb", "measuring-new"]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be told")
def test_the_disk_is_read_once_without_the_page_cache(model, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("os.posix_fadvise", lambda file, start, size, what: told.append((start, size, what)))
    with open_engine(model, tmp_path) as engine:
        engine.advise(limit_s=0.1)
    assert told == [(0, 0, os.POSIX_FADV_DONTNEED)]


def test_a_pool_is_measured_as_a_gpus_is(model):
    """The GPU tier's pool, on this device."""
    sample = Sample(Decoder(model))
    with TieredStore(gpu_bytes=1 << 26, cpu_bytes=1 << 26, device="cpu") as store:
        sample.put(store)
        assert set(store.where(sample.keys.values()).values()) == {"gpu"}
        loading = sample.loading(store, "gpu")
    assert loading.bytes_per_s > 0 and loading.token_bytes * sum(map(len, sample.chunks)) >= 0.9 * sample.nbytes


def test_what_follows_from_figures():
    rates = Rates(COSTS, {"disk": Loading(1e6, 1000, 0.25)}, piece_tokens=500)
    assert rates.compute_s(0) == rates.load_s({}) == rates.load_s({"disk": 0}) == 0
    assert rates.compute_s(1000) == pytest.approx(0.5 + 0.5 * 1.25), "in two pieces, the second behind the first"
    assert rates.compute_s(500, 1000) == pytest.approx(0.75)
    assert rates.load_s({"disk": 500}) == pytest.approx(0.75)
    away = {"pool": Loading(1e6, 1000, 0.0, True), "cpu": Loading(1e7, 1000), **rates.tiers}
    pooled = replace(rates, tiers=away)  # 2 s on their way, 0.2 s to place them, 0.75 s from the disk
    assert pooled.prompt_s({"pool": 2000}, 3) == pytest.approx(5.2)
    assert pooled.prompt_s({"pool": 2000, "disk": 500}, 3, front_s=1.5) == pytest.approx(0.75 + 0.2 + 2 + 1.5)
    assert pooled.prompt_s({"pool": 2000}, 3, front_s=2.5) == pytest.approx(0.2 + 3)
    assert replace(pooled, beside=True).prompt_s({"pool": 2000}, 3) == 3
    assert rates.prompt_s({"disk": 1750}, 3) == 5 and replace(rates, beside=True).prompt_s({"disk": 1750}, 3) == 3
    assert rates.read_s(2500, 1000) == pytest.approx(2 * rates.compute_s(1000) + rates.compute_s(500))
    for wrong in (Loading(0, 1), Loading(1, 0), Loading(1, float("nan")), Loading(1, 1, -1)):
        with pytest.raises(StoreError, match="of the tier 'disk'"):
            Rates(COSTS, {"disk": wrong})
    with pytest.raises(StoreError, match="piece_tokens"):
        Rates(COSTS, {}, piece_tokens=0)


def test_what_is_measured_with_has_the_models_shapes():
    """Keys and values need not be of one width."""
    kv = random_kv([LayerSpec(2, 6, 4, torch.bfloat16, torch.device("cpu"))] * 3, 5)
    assert [(k.shape, v.shape, k.dtype) for k, v in kv] == [((2, 5, 6), (2, 5, 4), torch.bfloat16)] * 3
