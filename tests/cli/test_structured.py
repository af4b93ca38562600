"""Schemas and log-probabilities of RAG, and of the command line."""

import json

import pytest

from ragkv import RAG, bundled
from ragkv.cli import main


@pytest.fixture
def folder(tmp_path, capsys):
    (tmp_path / "clearport.md").write_text(bundled.documents()["clearport.md"])
    assert main(["add", str(tmp_path / "clearport.md"), "--path", str(tmp_path / "kept")]) == 0
    capsys.readouterr()
    return tmp_path


def asked(folder, capsys, *options):
    code = main(["ask", "Is Clearport a town?", "--top-k", "1", "--path", str(folder / "kept"), *map(str, options)])
    return code, *capsys.readouterr()


def test_schema_and_logprobs(folder, capsys):
    schema = folder / "schema.json"
    schema.write_text(json.dumps({"enum": ["a town", "a river"]}))
    code, out, _ = asked(folder, capsys, "--schema", schema, "--logprobs", 3, "--json")
    found = json.loads(out)
    assert code == 0 and found["value"] in ("a town", "a river") and json.loads(found["answer"]) == found["value"]
    assert len(found["logprobs"]) == found["report"]["new_tokens"]
    assert all(one["logprob"] <= 0 and 1 <= len(one["top"]) <= 3 for one in found["logprobs"])

    code, out, err = asked(folder, capsys, "--schema", schema, "--max-new-tokens", 2, "--json")
    found = json.loads(out)
    assert code == 1 and found["value"] is None and "logprobs" not in found
    assert err.splitlines()[-1].startswith("ragkv: the answer ended before it was whole JSON")


@pytest.mark.parametrize(("text", "message"), [("{", "no JSON"), ("[]", "an object")])
def test_a_file_that_is_no_schema(text, message, folder, capsys):
    (folder / "bad.json").write_text(text)
    with pytest.raises(SystemExit):
        asked(folder, capsys, "--schema", folder / "bad.json")
    assert message in capsys.readouterr().err


async def test_every_way_to_ask(folder):
    schema, question = {"enum": ["a town", "a river"]}, "Is Clearport a town?"
    with RAG.open(folder / "kept") as rag:
        answer = rag.ask(question, schema=schema, logprobs=True)
        assert answer.value in schema["enum"] and answer.sources and len(answer.logprobs) == len(answer.token_ids)
        _, stream = rag.stream(question, schema=schema)
        assert "".join(stream) == answer.text and stream.value == answer.value
        assert (await rag.aask(question, schema=schema)).value == answer.value
        pieces = rag.astream(question, schema=schema, logprobs=True)
        assert "".join([piece async for piece in pieces]) == answer.text
        assert pieces.value == answer.value and pieces.logprobs == answer.logprobs
