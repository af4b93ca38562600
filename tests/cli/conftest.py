"""Model and embedder are loaded once for all commands."""

from copy import deepcopy

import pytest

from ragkv import bundled
from ragkv.model.packed import pack
from ragkv.retrieval import offline_embedder


@pytest.fixture(scope="session")
def loaded():
    return bundled.load(), offline_embedder()


@pytest.fixture
def home(loaded, tmp_path, monkeypatch):
    """Where commands keep folders that nobody names; not there yet. Whoever packs weights, which is done in place, has a copy."""
    (model, tokenizer), embedder = loaded
    monkeypatch.setattr("ragkv.bundled.load", lambda: (model, tokenizer))
    monkeypatch.setattr("ragkv.model.packed.pack", lambda model, packing: pack(deepcopy(model), packing))
    monkeypatch.setattr("ragkv.retrieval.retriever.offline_embedder", lambda: embedder)
    monkeypatch.setenv("RAGKV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
