"""A pool given to a RAG, and to the command line."""

import pytest

from ragkv import RAG, ArgumentError, StoreError, TieredStore
from ragkv.defaults import kept_in

from .rags import DOCUMENTS, WordEmbedder


def test_two_folders_share_a_pool(tmp_path):
    url, texts = f"file://{tmp_path}/pool", list(DOCUMENTS.values())[:2]
    options = {"embedder": WordEmbedder(), "remote": url}
    with RAG.from_pretrained("bundled", path=tmp_path / "one", **options) as one:
        assert one.add_texts(texts, ["a", "b"]).tokens_read > 0
        one.engine.store.flush()
        want = one.ask("Who lives there?", top_k=2, max_new_tokens=4)
    with RAG.from_pretrained("bundled", path=tmp_path / "two", **options) as two:
        assert two.add_texts(texts, ["a", "b"]).tokens_read == 0
        got = two.ask("Who lives there?", top_k=2, max_new_tokens=4)
        assert got.token_ids == want.token_ids and set(got.report.fusion.sources) <= {"remote", "cpu", "disk"}
        two.remove("a")
        two.engine.store.flush()
        left = {key.hex() for key in two._keys("b")}
    assert {file.name for file in (tmp_path / "pool").glob("*/*")} == left, "what was removed is still in the pool"
    assert "remote" not in kept_in(tmp_path / "two"), "a URL may hold a secret"


def test_a_store_of_ones_own_has_its_own_pool(tmp_path):
    with TieredStore(cpu_bytes=1 << 20) as store, pytest.raises(ArgumentError, match="store= or remote="):
        RAG.from_pretrained("bundled", store=store, remote="memory://x", embedder=WordEmbedder())
    with pytest.raises(StoreError, match="a pool is s3://"):
        RAG.from_pretrained("bundled", remote="bucket/prefix", embedder=WordEmbedder())
