"""The ten lines that docs/adapters.md begins a framework with run as they stand, but for the model's name."""

import re
from pathlib import Path

import pytest

from ragkv import RAG
from tests.rag.rags import DOCUMENTS, WordEmbedder

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


def run(section, number=0, names=None):
    """Runs a code block of a section; returns what it named."""
    names = {} if names is None else names
    block = re.findall(r"```python\n(.*?)```", PAGE.split(f"\n## {section}\n")[1], re.DOTALL)[number]
    exec(block.replace("Qwen/Qwen3-0.6B", "bundled"), names)
    return names


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of documents, and words in place of an embedding model."""
    (tmp_path / "docs").mkdir()
    for name, text in DOCUMENTS.items():
        (tmp_path / "docs" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ragkv.opening.load_embedder", lambda *_: WordEmbedder())


def test_llama_index(monkeypatch, capsys):
    from llama_index.core import Settings
    from llama_index.core.node_parser import TokenTextSplitter

    # Its default splitter looks for stop words that nltk refuses to read where an installer has linked its files.
    splitter = TokenTextSplitter(chunk_size=64, chunk_overlap=0, tokenizer=str.split)
    monkeypatch.setattr(Settings, "_node_parser", splitter)
    monkeypatch.setattr(Settings, "_transformations", None)
    rag = run("LlamaIndex")["rag"]
    with rag:
        assert capsys.readouterr().out.strip()
        assert len(rag.documents()) == len(DOCUMENTS)


def test_haystack(capsys):
    with RAG.from_pretrained(path="kv/") as rag:
        rag.add_files("docs/")
    names = run("Haystack")
    assert names["said"]["replies"] and "clear" in capsys.readouterr().out
    first = names["pipeline"]
    again = run("Haystack", 1, names)["pipeline"]
    assert again is not first and again.dumps() == first.dumps()
    first.close()
