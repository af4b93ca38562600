"""Model and embedder are loaded once for all commands."""

import pytest

from ragkv import bundled
from ragkv.retrieval import offline_embedder


@pytest.fixture(scope="session")
def loaded():
    return bundled.load(), offline_embedder()


@pytest.fixture
def home(loaded, tmp_path, monkeypatch):
    """Where commands keep folders that nobody names; not there yet."""
    model, embedder = loaded
    monkeypatch.setattr("ragkv.bundled.load", lambda: model)
    monkeypatch.setattr("ragkv.retrieval.retriever.offline_embedder", lambda: embedder)
    monkeypatch.setenv("RAGKV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
