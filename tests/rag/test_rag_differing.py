"""A folder that is opened otherwise than it was read: what differs is named, where documents are read again for it."""

import logging
from dataclasses import replace

import pytest
import torch

from ragkv.exchange import export_folder, import_folder
from ragkv.testing import tiny_model

from .rags import DOCUMENTS, QUESTION, TEMPLATE, open_rag, small_model

TEXTS = dict(list(DOCUMENTS.items())[:2])


def model_of(key=None, **options):
    model = tiny_model(vocab_size=1792, **options)
    if key is not None:
        model.config.key_of_nobody = key
    return model


@pytest.fixture
def said(caplog):
    """What is said of it when a folder is opened."""
    caplog.set_level(logging.WARNING)

    def said(path, model, **options):
        caplog.clear()
        with open_rag(path, model, **options):
            return [record.getMessage() for record in caplog.records if record.name == "ragkv.library.differing"]

    return said


@pytest.fixture
def folder(tmp_path):
    with open_rag(tmp_path / "folder", model_of()) as rag:
        rag.add_texts(list(TEXTS.values()), list(TEXTS))
    return tmp_path / "folder"


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"model": {"dtype": torch.bfloat16}}, "dtype (float32, now bfloat16)"),
        ({"model": {"attn_implementation": "eager"}}, "attention implementation (sdpa, now eager)"),
        ({"model": {"rms_norm_eps": 1e-3}}, "configuration rms_norm_eps (1e-06, now 0.001)"),
        ({"model": {"key": 7}}, "configuration key_of_nobody (none, now 7)"),
        ({"model": {"seed": 1}}, "weights"),
        ({"model": {"num_hidden_layers": 2}}, "model"),
        ({"template": replace(TEMPLATE, prefix="Read this.")}, "template prefix"),
        (
            {"template": replace(TEMPLATE, after_chunk="\n\n")},
            "tokenizer or the template's before_chunk and after_chunk",
        ),
        ({"namespace": "mine"}, "namespace (none, now mine)"),
        ({"context": "chunk", "namespace": "x"}, "namespace (none, now x), context (document, now chunk)"),
        ({"document_tokens": 128}, "document_tokens (2044, now 128)"),
    ],
)
def test_what_differs_is_named(folder, said, changed, names):
    options = {**changed, "model": model_of(**changed.get("model", {}))}
    assert said(folder, **options) == [
        f"documents of {folder} that are read again when they are asked for: 2; what differs from when they were read: {names}"
    ]


def test_nothing_is_said_where_nothing_is_read_again(folder, said, tmp_path):
    assert said(folder, model_of()) == []
    assert said(tmp_path / "new", model_of()) == []
    with open_rag(folder, small_model(seed=1)) as rag:
        assert rag.refresh() > 0
    assert said(folder, model_of()) == [] == said(folder, small_model(seed=1)), "both have read it"
    with open_rag(folder, small_model(seed=2)) as rag:
        rag.ask(QUESTION, max_new_tokens=1, top_k=20)
    assert said(folder, small_model(seed=2)) == [], "a question has"


def test_an_imported_folder_knows_it_too(folder, said, tmp_path):
    export_folder(folder, tmp_path / "all.tar")
    import_folder(tmp_path / "other", tmp_path / "all.tar", disk_bytes=1 << 30)
    assert said(tmp_path / "other", model_of()) == []
    (warning,) = said(tmp_path / "other", model_of(dtype=torch.bfloat16))
    assert warning.endswith(": dtype (float32, now bfloat16)")
