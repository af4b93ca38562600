"""The shipped model, its tokenizer and its fixed documents."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import ragkv.bundled as bundled
from ragkv.bundled import TEMPLATE
from ragkv.evaluation import read_cases


@pytest.fixture(scope="module")
def loaded():
    return bundled.load()


@pytest.fixture(scope="module")
def cases():
    return read_cases(bundled.CASES_PATH)[1]


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids if text else []


def prompt_ids(tokenizer, case):
    """The ids that ``ragkv.PromptTemplate(**TEMPLATE)`` makes: every segment on its own, BOS once."""
    parts = [TEMPLATE["prefix"]]
    for place in case.retrieved:
        parts += [TEMPLATE["before_chunk"], case.text(place), TEMPLATE["after_chunk"]]
    parts += [TEMPLATE["before_question"], case.question, TEMPLATE["after_question"]]
    return [tokenizer.bos_token_id] + [token for part in parts for token in encode(tokenizer, part)]


def answer(model, tokenizer, ids):
    out = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def test_size_and_shape(loaded):
    model, tokenizer = loaded
    assert sum(path.stat().st_size for path in bundled.MODEL_PATH.iterdir()) <= 16 << 20
    assert model.dtype == torch.float32 and not model.training
    config = model.config
    assert 6 <= config.num_hidden_layers <= 8
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 4096
    assert len(tokenizer) == config.vocab_size


def test_answers_like_a_model_that_reads(loaded, cases):
    """Over six documents with held-out names. A model that only looks the relation up gets one in three; a broken one nothing."""
    model, tokenizer = loaded
    asked = [case for case in cases[:80] if case.kind != "unnamed"]
    right = dict.fromkeys([case.kind for case in asked], 0)
    for case in asked:
        right[case.kind] += answer(model, tokenizer, prompt_ids(tokenizer, case)) == case.answers[0]
    assert len(right) == 7 and sum(right.values()) >= 60, right
    assert all(count >= 6 for count in right.values()), right


def test_no_context_no_answer(loaded, cases):
    model, tokenizer = loaded
    asked = [replace(c, retrieved=()) for c in cases[:32] if c.kind in ("direct", "local", "cross")]
    right = sum(answer(model, tokenizer, prompt_ids(tokenizer, case)) == case.answers[0] for case in asked)
    assert right / len(asked) < 0.25


@pytest.mark.parametrize("text", ["", "one", "two  spaces", "line\nbreaks\n\n", "tab\there", "naïve 1947 €", "\n"])
def test_text_survives_the_tokenizer(loaded, text):
    _, tokenizer = loaded
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_a_name_has_the_same_ids_wherever_it_stands(loaded):
    _, tokenizer = loaded
    name = encode(tokenizer, "Mira Kolvane")
    inside = encode(tokenizer, "They met Mira Kolvane there")
    assert any(inside[i : i + len(name)] == name for i in range(len(inside)))


def test_tokenizer_puts_one_bos_in_front(loaded):
    _, tokenizer = loaded
    assert tokenizer("Mira").input_ids == [tokenizer.bos_token_id, *encode(tokenizer, "Mira")]


def test_questions_rest_on_the_documents():
    documents, asked = bundled.documents(), bundled.questions()
    assert 24 <= len(documents) <= 60
    assert len(asked) >= 20
    for question in asked:
        text = "\n".join(documents[name] for name in question.documents)
        if question.kind == "absent":
            assert not question.documents
        else:
            assert all(part in text for part in question.answer.split(": "))


def test_import_is_light():
    """Texts are read without torch and transformers, beyond what ``import ragkv`` itself loads."""
    code = (
        "import sys, ragkv; before = set(sys.modules); import ragkv.bundled as b; b.documents(), b.questions(), b.foreign();"
        "print({name.split('.')[0] for name in set(sys.modules) - before} & {'torch', 'transformers', 'tokenizers'})"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_who_names_no_model_is_told_what_it_is(tmp_path, caplog):
    from ragkv import RAG

    for given, told in ({}, True), ({}, False), ({"model": "bundled"}, False):
        with RAG.from_pretrained(path=tmp_path, **given) as rag:
            rag.add_texts(["Mira Lund runs the mill."])
        assert [("a toy" in line and "from_pretrained('Qwen" in line) for line in caplog.messages] == [True] * told
        caplog.clear()


def test_it_brings_a_foreign_text_that_it_can_read(loaded):
    """Its tokenizer cuts English into scraps; a text of its own world is words, about subjects that no document is about."""
    from ragkv import RAG
    from ragkv.library.sensitivity import FOREIGN

    per_word = [len(encode(loaded[1], text)) / len(text.split()) for text in (bundled.foreign(), FOREIGN)]
    assert per_word[0] < per_word[1]
    read = "\n".join(bundled.documents().values())
    assert not any(line in read for line in bundled.foreign().splitlines())
    with RAG.from_pretrained() as rag:
        reader = rag.engine.documents.reader
        assert list(reader._foreign_ids) == encode(loaded[1], bundled.foreign()) + encode(
            loaded[1], TEMPLATE["after_chunk"]
        )
