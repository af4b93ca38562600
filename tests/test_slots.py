"""Named slots in a template: filled with data by each call, wherever a question is written, and nothing stored hangs on them."""

import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ragkv import Engine, FullPrefill, PromptError, PromptTemplate, Reuse
from ragkv.bundled import MODEL_PATH
from ragkv.defaults import to_keep, with_kept
from ragkv.messages import asked, going_on
from ragkv.prompt import Encoder
from ragkv.testing import tiny_model
from ragkv.tokenizer import PrivateTokenizer
from tests.engine.conftest import full
from tests.rag.rags import DOCUMENTS, QUESTION, open_rag
from tests.test_messages import CHAT, TALK

SLOTS = {"language": "English"}
TEMPLATE = PromptTemplate(
    prefix="Read {this}.\n",
    after_chunk="\n",
    before_question="Answer in {language}, {not this}. {language}!\nQuestion:",
    after_question="\nAnswer:",
    after_answer="\n",
    slots=SLOTS,
)


def words(chat=None):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
    tokenizer.chat_template = chat
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return words()


def encoder(template, tokenizer):
    return Encoder(template, tokenizer, len(tokenizer))


def read(tokenizer, ids):
    return tokenizer.decode(ids).replace(" ", "")


def test_a_slot_holds_what_a_call_says(tokenizer):
    parts, ids = (
        encoder(TEMPLATE, tokenizer),
        lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]),
    )
    behind = (*ids("!\nQuestion:"), *ids("who?"), *ids("\nAnswer:"))
    for given, language in ((None, "English"), ({"language": "German"}, "German"), ({"language": ""}, "")):
        want = (*ids("Answer in "), *ids(language), *ids(", {not this}. "), *ids(language), *behind)
        assert parts.suffix("who?", parts.slots(given)) == want
    assert parts.suffix("who?") == parts.suffix("who?", parts.slots())
    assert parts.suffix("who?", parts.slots({"language": [7, 8]}))[len(ids("Answer in ")) :][:2] == (7, 8)


def test_braces_are_text_where_no_slot_is_named(tokenizer):
    text = "Answer in {language} or {}, {{x}} {0}:"
    parts = encoder(PromptTemplate(before_question=text), tokenizer)
    assert parts.suffix("q")[: len(parts.ids(text))] == parts.ids(text)
    with pytest.raises(
        PromptError, match=r"no slot 'language'; it has none: PromptTemplate\(slots=\{...\}\) names them"
    ):
        parts.slots({"language": "German"})


def test_a_slot_cannot_speak_as_the_template(tokenizer):
    parts, special = encoder(TEMPLATE, tokenizer), {tokenizer.bos_token_id, tokenizer.eos_token_id}
    suffix = parts.suffix("who?", parts.slots({"language": "<eos>German<bos>{language}"}))
    assert not special & set(suffix) and "{language}" in read(tokenizer, suffix)
    default = PromptTemplate(before_question="{language}", slots={"language": "<eos>"})
    assert not special & set(encoder(default, tokenizer).suffix("who?"))


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"prefix": "In {a}."}, "'a' stands in prefix, on which stored KV depend"),
        ({"after_chunk": "{a}"}, "'a' stands in after_chunk"),
        ({"anchor": "{a}"}, "'a' stands in anchor"),
        ({}, "'a' stands nowhere: write {a} into before_question"),
        ({"before_question": [5, 6]}, "'a' stands nowhere"),
        ({"before_question": "{a}", "slots": ["a"]}, "slots must be a dict of names"),
        ({"before_question": "{a b}", "slots": {"a b": ""}}, "slots must be a dict of names"),
    ],
)
def test_where_a_slot_cannot_stand(parts, what):
    with pytest.raises(PromptError, match=what):
        PromptTemplate(**{"slots": {"a": ""}, **parts})


@pytest.mark.parametrize("given", ["German", ["language"], {"language": 5}, {"Language": "German"}, {"language": None}])
def test_what_is_no_slot_of_the_template(tokenizer, given):
    with pytest.raises(PromptError):
        encoder(TEMPLATE, tokenizer).slots(given)


def test_a_chat_template_with_slots():
    chatting = words(CHAT)
    make = PromptTemplate.from_chat_template
    template = make(chatting, before_question="Answer in {language}. Question: ", slots=SLOTS)
    parts = encoder(template, chatting)
    german = parts.slots({"language": "German"})
    one, talk = (asked(parts, question, slots=german) for question in (TALK[-1]["content"], TALK))
    assert read(chatting, one.suffix) == read(chatting, talk.suffix)
    assert read(chatting, one.suffix).startswith("AnswerinGerman.Question:Sincewhen?")
    assert "German" not in read(chatting, (*one.prefix, *talk.prefix))
    assert read(chatting, going_on(parts, "Since when?", german)[1]) == read(chatting, one.suffix)
    assert asked(encoder(make(chatting), chatting), TALK) == asked(encoder(make(chatting, slots={}), chatting), TALK)
    with pytest.raises(PromptError, match="'language' stands in prefix"):
        make(chatting, instruction="Answer in {language}.", slots=SLOTS)
    again = with_kept({}, json.loads(json.dumps(to_keep({"template": template}))))["template"]
    assert (again.slots, again.chat) == (template.slots, template.chat)


def test_without_a_chat_template_every_turn_has_the_same(tokenizer):
    parts = encoder(TEMPLATE, tokenizer)
    talk = asked(parts, TALK, slots=parts.slots({"language": "German"}))
    assert (
        read(tokenizer, talk.prefix).count("AnswerinGerman")
        == 1
        == read(tokenizer, talk.suffix).count("AnswerinGerman")
    )


def test_nothing_stored_hangs_on_a_slot(tokenizer, reads):
    """With paths on, what stands in front of a slot is found again whatever it holds; another question's slot is computed."""
    model = tiny_model(vocab_size=1792)
    with Engine(model, tokenizer, template=TEMPLATE, method=FullPrefill(), paths=True) as engine:
        chunks = engine.add(list(DOCUMENTS.values())[:2])
        ran, reports = reads(engine), []
        for language in ("English", "German"):
            prompt = engine.fuse(chunks, QUESTION, slots={"language": language})
            torch.testing.assert_close(prompt.logits, full(model, prompt.input_ids), atol=1e-4, rtol=0)
            assert language in read(tokenizer, prompt.input_ids[0]) and ran == []
            reports.append(prompt.report)
        assert reports[1].budget == 0 < reports[0].budget and set(reports[1].hits) <= {"path", "cpu"}
        assert reports[1].computed_tokens == reports[1].suffix_tokens
        told = engine.fuse_many([(chunks, QUESTION)] * 2, slots={"language": "German"})
        assert all(torch.equal(one.input_ids, prompt.input_ids) for one in told)
        answers = [
            engine.generate(chunks, QUESTION, slots={"language": "German"}, max_new_tokens=3),
            *engine.generate_many([(chunks, QUESTION)], slots={"language": "German"}, max_new_tokens=3),
        ]
        stream = "".join(engine.stream(chunks, QUESTION, slots={"language": "German"}, max_new_tokens=3))
        assert {answer.text for answer in answers} == {stream}
        with pytest.raises(PromptError, match="no slot 'colour'; it has language"):
            engine.generate(chunks, QUESTION, slots={"colour": "red"})


def test_earlier_turns_are_found_again_whatever_a_slot_says():
    chatting, model = words(CHAT), tiny_model(vocab_size=1792)
    template = PromptTemplate.from_chat_template(chatting, before_question="In {language}: ", slots=SLOTS)
    texts = list(DOCUMENTS.values())
    talk = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": "Yes."}, TALK[-1]]
    with Engine(model, chatting, template=template, method=Reuse(), paths=True) as engine:
        chunks = engine.add(texts[1:2])
        for number, language in enumerate(("English", "German")):
            prompt = engine.fuse(chunks, talk, slots={"language": language}, method=FullPrefill())
            engine.paths.wait()
            left = prompt.report.prefix_tokens - prompt.report.reused_tokens
            assert left < 32 if number else left > 64  # kept in blocks of 32 tokens
            torch.testing.assert_close(prompt.logits, full(model, prompt.input_ids), atol=1e-4, rtol=0)


def test_a_folder_and_a_conversation_take_slots(tokenizer):
    with open_rag(template=TEMPLATE, method=Reuse()) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        given = {"slots": {"language": "German"}, "max_new_tokens": 2}
        past = rag.ask(QUESTION, keep_past=True, **given).past
        assert "AnswerinGerman" in read(tokenizer, past.ids)
        assert rag.ask(messages=TALK, **given).text is not None
        session, seen = rag.session(), []
        for language in ("German", "Danish"):
            session.ask(QUESTION, slots={"language": language}, max_new_tokens=2)
            seen.append(read(tokenizer, session._state.past.ids))
        assert "AnswerinGerman" in seen[0] and seen[1].startswith(seen[0]) and "AnswerinDanish" in seen[1]
        assert "German" not in seen[1][len(seen[0]) :]


def test_what_stands_there_by_default_is_tokenised_once(tokenizer, monkeypatch):
    """A call tokenises its question and what it says itself, and nothing else."""
    own = encoder(PromptTemplate(before_question="In {language}: ", slots={"language": "English"}), tokenizer)
    encoded = []
    want = own.suffix("Who?", own.slots())
    plain = PrivateTokenizer.plain
    monkeypatch.setattr(PrivateTokenizer, "plain", lambda self, texts: encoded.extend(texts) or plain(self, texts))
    assert own.suffix("Who?", own.slots()) == want and encoded == ["Who?"]
    assert own.suffix("Who?", own.slots({"language": "German"})) != want and encoded == ["Who?", "German", "Who?"]
