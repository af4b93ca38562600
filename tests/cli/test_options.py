"""What a folder was made with is kept by add, used by ask, and shown by stats."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from ragkv import bundled
from ragkv.cli import main
from ragkv.retrieval import offline_embedder
from ragkv.testing import tiny_model


@pytest.fixture(scope="module")
def embedder():
    return offline_embedder()


@pytest.fixture
def run(embedder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ragkv.retrieval.retriever.offline_embedder", lambda: embedder)
    monkeypatch.setenv("RAGKV_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clearport.md").write_text(bundled.documents()["clearport.md"])

    def run(*argv):
        capsys.readouterr()  # of what the test itself did
        code = main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return run


def test_a_folder_need_not_be_told_again(run, tmp_path):
    tiny_model(vocab_size=1792).save_pretrained(tmp_path / "models" / "small")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bundled.MODEL_PATH, local_files_only=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    made = ("--model", "models", "--subfolder", "small", "--tokenizer", "tokenizer", "--dtype", "float32")
    more = ("--system", "Be brief.", "--method", "reuse", "--chunk-tokens", 40, "--namespace", "mine")
    code, out, err = run("add", "clearport.md", *made, *more, "--codec", "lossless", "--local-files-only")
    assert code == 0 and err.startswith("to read: ") and out.startswith("documents: 1 added")

    code, out, _ = run("ask", "Where?", "--max-new-tokens", 2, "--json")
    found = json.loads(out)
    assert code == 0 and found["report"]["fusion"]["method"] == "Reuse()"
    assert {source["kv"] for source in found["sources"]} == {"disk"}, "nothing was read again"
    assert json.loads(run("add", "clearport.md", "--json")[1])["tokens_read"] == 0

    kept = json.loads(run("stats", "--json")[1])["made_with"]
    assert kept == {
        "model": str(tmp_path / "models"),
        "subfolder": "small",
        "tokenizer": str(tmp_path / "tokenizer"),
        "dtype": "float32",
        "system": "Be brief.",
        "method": "reuse",
        "chunk_tokens": 40,
        "codec": "lossless",
        "namespace": "mine",
        "embedder": "all-MiniLM-L6-v2",
    }
    out = run("stats")[1]
    assert f"model: {tmp_path}/models\n" in out and "system: Be brief.\n" in out

    assert run("export", "all.tar")[0] == run("import", "all.tar", "--path", "other")[0] == 0
    code, out, _ = run("ask", "Where?", "--max-new-tokens", 2, "--json", "--path", "other")
    again = json.loads(out)
    assert (code, again["answer"]) == (0, found["answer"])
    assert {source["kv"] for source in again["sources"]} == {"disk"}

    (tmp_path / "models").rename(tmp_path / "moved")
    code, out, err = run("ask", "Where?")
    assert (code, out, err.count("\n")) == (1, "", 1) and f"{tmp_path}/models" in err and "(--model)" in err
    code, out, _ = run(
        "ask", "Where?", "--model", "moved", "--subfolder", "small", "--tokenizer", "tokenizer", "--json"
    )
    assert code == 0 and {source["kv"] for source in json.loads(out)["sources"]} == {"disk"}


def test_options_of_no_use_are_refused(run):
    for option in (("--revision", "main"), ("--system", "Be brief."), ("--trust-remote-code",)):
        code, out, err = run("add", "clearport.md", *option)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert option[0][2:].replace("-", "_") in err and "bundled" in err


def test_packed_weights_are_kept_and_lookup_says_the_same(run):
    assert run("add", "clearport.md", "--path", "kv", "--weights", "int8")[0] == 0
    asked = ("ask", "Who runs the company?", "--path", "kv", "--max-new-tokens", 24, "--json")
    plain, looked = (json.loads(run(*asked, *more)[1]) for more in ((), ("--lookup", 4)))
    assert plain["answer"] == looked["answer"] and plain["answer"]
    assert json.loads(run("stats", "--path", "kv", "--json")[1])["made_with"]["weights"] == "int8"
