"""Answers a program can use: JSON of a schema, and log-probabilities."""

import json
import sys
from collections.abc import Callable
from typing import Literal

import jsonschema
import pytest
import torch
from pydantic import BaseModel, ConfigDict, create_model

from ragkv import ArgumentError, Engine, FullPrefill, IncompleteAnswerError, MissingPackageError, bundled
from ragkv.testing import random_ids

from .conftest import QUESTION, TEMPLATE

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["river", "town"]},
        "sure": {"type": "boolean"},
        "parts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["kind", "sure", "parts"],
    "additionalProperties": False,
}


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")

    river: bool
    rank: Literal[1, 2] | None


@pytest.fixture(scope="module")
def reading():
    engine = Engine(*bundled.load()[:2])
    with engine:
        yield engine, engine.add_document(["Clearport lies on the Moor.", "It is a town."])


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 3.0, "top_k": 3}, {"num_beams": 3}],
    ids=["greedy", "sampled", "beams"],
)
def test_an_answer_fits_its_schema(reading, options):
    engine, chunks = reading
    torch.manual_seed(3)
    answer = engine.generate(chunks, "On which river?", schema=SCHEMA, max_new_tokens=120, **options)
    jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert answer.value == json.loads(answer.text)


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 2, "top_p": 1e-6}], ids=str
)
def test_a_schema_comes_before_what_leaves_few_tokens(reading, options):
    """Behind it nothing would be left: the likeliest token of all is seldom one that the schema allows."""
    engine, chunks = reading
    free, fitting = (
        engine.generate(chunks, "On which river?", max_new_tokens=60, **more) for more in ({}, {"schema": SCHEMA})
    )
    assert not free.text.lstrip().startswith("{")
    options = {"do_sample": True, "temperature": 1.0, **options}
    sampled = engine.generate(chunks, "On which river?", schema=SCHEMA, max_new_tokens=60, **options)
    assert sampled.text == fitting.text and sampled.value


def test_streams_pydantic_and_any_object(reading):
    engine, chunks = reading
    stream = engine.stream(chunks, "On which river?", schema=Place, max_new_tokens=120, stop="\n")
    assert "".join(stream) == stream.text
    assert isinstance(stream.value, Place) and stream.value == Place.model_validate_json(stream.text)
    cut = engine.generate(chunks, "On which river?", schema="json", max_new_tokens=3)
    assert cut.text.startswith("{")


def test_an_answer_that_is_cut_keeps_its_text(reading):
    engine, chunks = reading
    answer = engine.generate(chunks, "On which river?", schema=SCHEMA, max_new_tokens=4)
    with pytest.raises(IncompleteAnswerError, match="max_new_tokens") as raised:
        _ = answer.value
    assert raised.value.text == answer.text != "" and answer.text in '{"kind": "river", {"kind": "town"'
    free = engine.generate(chunks, "On which river?", max_new_tokens=2)
    with pytest.raises(ArgumentError, match="schema="):
        _ = free.value


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "wrong"}, "Invalid type"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"const": {1, 2}}, "no JSON"),
        ({"const": float("nan")}, "no JSON"),
        ({"const": "\ud800"}, "no JSON"),
        (create_model("Town", mayor=(Callable, ...)), "no JSON"),
        ("xml", "'xml'"),
        (7, "pydantic"),
    ],
)
def test_a_bad_schema_is_refused_before_the_prompt(reading, schema, message, monkeypatch):
    engine, chunks = reading
    monkeypatch.setattr(type(engine.prompting), "prompt", lambda *args: pytest.fail("the prompt was made"))
    with pytest.raises(ArgumentError, match=message):
        engine.generate(chunks, "On which river?", schema=schema)


def test_what_a_schema_needs(reading, engine, monkeypatch):
    from tests.some_tokenizers import EXACT

    with pytest.raises(ArgumentError, match="no tokenizer"):
        engine.generate([random_ids(9)], QUESTION, schema="json")
    slow = Engine(engine.model, EXACT["slow"], template=TEMPLATE)
    with pytest.raises(ArgumentError, match="fast tokenizer"):
        slow.generate([random_ids(9)], QUESTION, schema="json")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingPackageError, match=r"ragkv\[json\]"):
        reading[0].generate(reading[1], "On which river?", schema="json")


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "temperature": 1.7, "top_k": 9}], ids=["greedy", "sampled"]
)
def test_log_probabilities_are_transformers_own(engine, options):
    chunks = engine.add([random_ids(40), random_ids(50)])
    options = {"max_new_tokens": 8, "eos_token_id": None, **options}
    ids = engine.fuse(chunks, QUESTION, method=FullPrefill()).input_ids
    torch.manual_seed(1)
    plain = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), output_scores=True, return_dict_in_generate=True, **options
    )
    want = engine.model.compute_transition_scores(plain.sequences, plain.scores, normalize_logits=True)[0]
    torch.manual_seed(1)
    answer = engine.generate(chunks, QUESTION, method=FullPrefill(), logprobs=4, **options)
    assert answer.token_ids == plain.sequences[0, ids.shape[1] :].tolist() == [one.id for one in answer.logprobs]
    torch.testing.assert_close(torch.tensor([one.logprob for one in answer.logprobs]), want, atol=1e-4, rtol=1e-4)
    for one, scores in zip(answer.logprobs, plain.scores, strict=True):
        assert [other.id for other in one.top] == scores[0].topk(4).indices.tolist()
        assert one.top[0].logprob >= one.logprob and not one.top[0].top


def test_log_probabilities_of_streams_and_refusals(reading):
    engine, chunks = reading
    stream = engine.stream(chunks, "On which river?", logprobs=True, max_new_tokens=5)
    list(stream)
    assert [one.id for one in stream.logprobs] == stream.token_ids and not any(one.top for one in stream.logprobs)
    assert engine.generate(chunks, "On which river?", max_new_tokens=2).logprobs is None
    with pytest.raises(ArgumentError, match="logprobs must be >= 1"):
        engine.generate(chunks, "On which river?", logprobs=0)
    with pytest.raises(ArgumentError, match="num_beams"):
        engine.generate(chunks, "On which river?", logprobs=1, num_beams=2)
