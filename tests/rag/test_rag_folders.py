"""Folders survive restarts and crashes, and belong to one model and one embedder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ragkv import RAG, IncompatibleFolderError, PromptTemplate

from .rags import DOCUMENTS, QUESTION, WordEmbedder, open_rag, small_model, tokens_of

PROGRAM = Path(__file__).with_name("rag_killed.py")


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_a_restart_keeps_everything(model, tmp_path, reads):
    with open_rag(tmp_path, model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        want = rag.ask(QUESTION, max_new_tokens=5)
    with open_rag(tmp_path, model) as rag:
        seen = reads(rag.engine)
        got = rag.ask(QUESTION, max_new_tokens=5)
        assert got.report.fusion.hits == {"disk": 5}
        assert (got.token_ids, [hit.text for hit in got.sources]) == (
            want.token_ids,
            [hit.text for hit in want.sources],
        )
        assert rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS)).tokens_read == rag.refresh() == sum(seen) == 0
    with open_rag(tmp_path, model, template=PromptTemplate(prefix="Another instruction.\n", after_chunk="\n")) as rag:
        assert rag.refresh() == sum(tokens_of(rag, text) for text in DOCUMENTS.values())


def test_a_folder_of_another_model_or_embedder(model, tmp_path):
    with open_rag(tmp_path, model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
    with pytest.raises(IncompatibleFolderError, match=r"made with the model LlamaForCausalLM .* another folder"):
        open_rag(tmp_path, small_model(seed=1))
    with pytest.raises(IncompatibleFolderError, match=r"made with the embedder words .*, got others"):
        open_rag(tmp_path, model, WordEmbedder("others"))
    with pytest.raises(IncompatibleFolderError, match="model"):
        RAG.from_pretrained(path=tmp_path, embedder=WordEmbedder())
    with open_rag(tmp_path, model) as rag:  # nothing was left open, and nothing was lost
        assert rag.refresh() == 0
        assert rag.ask(QUESTION, max_new_tokens=2).report.fusion.hits == {"disk": 5}


def test_killed_while_adding(model, tmp_path):
    """After every kill the folder opens and answers; in the end it holds what a folder holds that was never killed."""
    child = [sys.executable, PROGRAM, tmp_path]
    run = subprocess.run(child, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    rounds = json.loads(run.stdout.splitlines()[-1])
    assert any(done["killed"] for done in rounds)
    counts = [done["documents"] for done in rounds]
    assert counts == sorted(counts)  # what was committed stays
    with open_rag(tmp_path / "killed", model) as killed, open_rag(tmp_path / "calm", model) as calm:
        killed.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        assert killed.refresh() == calm.refresh() == 0
        got, want = killed.ask(QUESTION, max_new_tokens=5), calm.ask(QUESTION, max_new_tokens=5)
        assert got.token_ids == want.token_ids
        assert "computed" not in got.report.fusion.hits
