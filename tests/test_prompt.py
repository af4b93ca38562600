"""Templates: segments are tokenised once each and spliced as ids, with one BOS, and documents cannot break out."""

import numpy as np
import pytest
import torch

from ragkv import Engine, LegoLink, PromptError, PromptTemplate, Reuse, bundled
from ragkv.prompt import Encoder

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def small():
    return bundled.load()


@pytest.fixture
def tokenizer(small):
    yield small[1]
    small[1].chat_template = None


def encoder(template, tokenizer):
    return Encoder(template, tokenizer, len(tokenizer))


def plain(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_segments_are_spliced_as_ids(tokenizer):
    parts = encoder(
        PromptTemplate(
            prefix="Read.", before_chunk="- ", after_chunk="\n", before_question="Q: ", after_question=" A:"
        ),
        tokenizer,
    )
    assert parts.chunk("Hello there") == plain(tokenizer, "- ") + plain(tokenizer, "Hello there") + plain(
        tokenizer, "\n"
    )
    assert parts.suffix("who?") == plain(tokenizer, "Q: ") + plain(tokenizer, "who?") + plain(tokenizer, " A:")
    assert parts.chunk([5, 6]) == (*plain(tokenizer, "- "), 5, 6, *plain(tokenizer, "\n"))


def test_chat_template_is_cut_into_parts(tokenizer):
    tokenizer.chat_template = CHAT
    template = PromptTemplate.from_chat_template(tokenizer, system="Be brief.", instruction="Use these.")
    assert template.prefix == "<bos><|system|>Be brief.\n<|user|>Use these.\n\n"
    assert template.before_question == "Question: "
    assert template.after_question == "\n<|assistant|>"
    parts = encoder(template, tokenizer)
    assert parts.prefix.count(tokenizer.bos_token_id) == 1 and parts.prefix[0] == tokenizer.bos_token_id
    messages = [{"role": "system", "content": "Be brief."}]
    messages.append({"role": "user", "content": "Use these.\n\nOne passage.\n\nQuestion: who?"})
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    spliced = [*parts.prefix, *parts.chunk("One passage."), *parts.suffix("who?")]
    # this tokenizer puts a space before a segment's first word; nothing else may differ
    assert tokenizer.decode(spliced).replace(" ", "") == whole.replace(" ", "")
    assert PromptTemplate.default(tokenizer).after_question == "\n<|assistant|>"


def test_a_date_in_the_prefix_is_pointed_out(tokenizer, caplog):
    tokenizer.chat_template = (
        "{{ date_string or strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    PromptTemplate.from_chat_template(tokenizer, date_string="1 Jan 2026")
    assert not caplog.records
    PromptTemplate.from_chat_template(tokenizer)
    assert "read again tomorrow" in caplog.text


def test_a_chat_template_that_fails(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(PromptError, match="System role not supported"):
        PromptTemplate.from_chat_template(tokenizer, system="Be brief.")


@pytest.mark.parametrize(
    ("template", "options", "what"),
    [
        ("{{ 'a' + tools }}", {}, "can only concatenate str"),
        ("{{ 1 / 0 }}", {}, "division by zero"),
        ({"a": CHAT, "b": CHAT}, {}, "multiple chat templates"),
        (CHAT, {"tokenize": True}, "leave out tokenize="),
        (CHAT, {"add_generation_prompt": False}, "leave out add_generation_prompt="),
        (CHAT, {"continue_final_message": True}, "not compatible"),
        (CHAT, {"tools": [5]}, "Tools should"),
        (CHAT, {"system": 5}, "system stands in .* must be a text, got 5"),
        (CHAT, {"instruction": [5]}, r"instruction stands in .* must be a text, got \[5\]"),
        (CHAT, {"before_question": None}, "before_question stands in .* must be a text, got None"),
    ],
)
def test_chat_templates_and_options_that_fail_in_other_ways(tokenizer, template, options, what):
    tokenizer.chat_template = template
    with pytest.raises(PromptError, match=what):
        PromptTemplate.from_chat_template(tokenizer, **options)


def test_chat_templates_that_cannot_be_cut(tokenizer):
    with pytest.raises(PromptError, match="no chat template"):
        PromptTemplate.from_chat_template(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(PromptError, match="changes the user's message"):
        PromptTemplate.from_chat_template(tokenizer)


def test_one_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    before = tokenizer._tokenizer.post_processor
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    try:
        for prefix in ("Read.", "<bos>Read."):
            parts = encoder(PromptTemplate(prefix=prefix, anchor="Some text."), tokenizer)
            assert parts.prefix[0] == bos and parts.prefix.count(bos) == 1 and len(parts.prefix) > 2
            assert parts.anchor == (bos, *plain(tokenizer, "Some text."))
            assert bos not in (*parts.chunk("Hello"), *parts.suffix("who?"))
        assert encoder(PromptTemplate(), tokenizer).prefix == (bos,)
    finally:
        tokenizer._tokenizer.post_processor = before


def test_documents_cannot_speak_as_the_template(tokenizer):
    parts = encoder(PromptTemplate(prefix="<bos>"), tokenizer)
    for text in ("a <bos> b", "<eos>", "x<eos>y"):
        special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        assert not special & set(parts.chunk(text))
        assert not special & set(parts.suffix(text))
        assert tokenizer.decode(parts.chunk(text)) == text


def test_an_anchor_lets_the_prefix_change(small):
    """Documents read behind a neutral text are found again under another instruction, and moved behind it."""
    model, tokenizer = small
    first = Engine(model, tokenizer, template=PromptTemplate(prefix="<bos>Read this.", anchor="<bos>"))
    chunk = first.add(["She lives in Oakwich."])[0]
    kv = first.store.get(first.documents.key(chunk))
    assert kv.base == 1
    second = Engine(
        model,
        tokenizer,
        store=first.store,
        template=PromptTemplate(prefix="<bos>Answer in one word, please.", anchor="<bos>"),
    )
    assert second.documents.missing([chunk]) == []
    prompt = second.fuse([chunk], "where?", method=Reuse())
    assert prompt.report.hits == {"cpu": 1}
    assert prompt.report.budget == 0
    for method in (LegoLink(k=4), None):
        repaired = second.fuse([chunk], "where?", method=method)
        assert repaired.report.budget > 0  # behind another prefix a chunk is not exact, even the first one
    other = Engine(model, tokenizer, store=first.store, template=PromptTemplate(prefix="<bos>Another."))
    assert other.documents.missing([chunk]) == [chunk]


def test_streaming_is_the_answer_in_pieces(small):
    model, tokenizer = small
    engine = Engine(model, tokenizer, template=PromptTemplate(**bundled.TEMPLATE), method=Reuse())
    chunks = engine.add(["Borik Bermore lives in Oakwich.", "Its mayor is Wenshi Yarwick."])
    for options in ({}, {"min_new_tokens": 12}):
        answer = engine.generate(chunks, " Where does Borik Bermore live?", max_new_tokens=16, **options)
        stream = engine.stream(chunks, " Where does Borik Bermore live?", max_new_tokens=16, **options)
        pieces = list(stream)
        assert "".join(pieces) == answer.text
        assert all(pieces)
        assert stream.token_ids == answer.token_ids
        assert stream.report.new_tokens == len(stream.token_ids) and stream.report.first_token_ms > 0
    assert len(pieces) > 3


def test_stop_strings(small):
    model, tokenizer = small
    engine = Engine(model, tokenizer, template=PromptTemplate(**bundled.TEMPLATE))
    chunks = engine.add(["Borik Bermore lives in Oakwich."])
    free = engine.generate(chunks, "Where?", max_new_tokens=20, min_new_tokens=20).text
    stop = free[3:5]
    stopped = engine.generate(chunks, "Where?", max_new_tokens=20, min_new_tokens=20, stop_strings=[stop]).text
    assert stop in stopped and len(stopped) < len(free) and free.startswith(stopped)


def test_streaming_needs_words(small):
    engine = Engine(small[0], template=PromptTemplate(prefix=[1]))
    with pytest.raises(PromptError, match="no tokenizer"):
        next(engine.stream([[5, 6]], [7]))


class Name(str):
    """A str that is not only a str."""


def test_text_of_all_kinds(tokenizer):
    parts = encoder(PromptTemplate(), tokenizer)
    assert parts.ids("") == ()
    assert parts.ids(Name("Hello")) == parts.ids("Hello") == plain(tokenizer, "Hello")
    assert tokenizer.decode(parts.ids("a\0b")) == "a\0b"
    with pytest.raises(PromptError, match="valid Unicode, got half a surrogate pair at 2"):
        parts.chunk("ab\ud800")


@pytest.mark.parametrize(
    "ids",
    [(5, 6), iter([5, 6]), np.array([5, 6]), list(np.array([5, 6])), torch.tensor([5, 6]), list(torch.tensor([5, 6]))],
)
def test_ids_of_all_kinds(ids):
    got = Encoder(PromptTemplate(), None, 10).ids(ids)
    assert got == (5, 6) and all(type(i) is int for i in got)


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        ([5, True], "whole numbers, got True"),
        ([5, int], "whole numbers, got <class 'int'>"),
        ([5, np.True_], "whole numbers, got True"),
        (np.array([True]), "whole numbers, got True"),
        (torch.tensor([True]), "whole numbers, got True"),
        ([5, torch.tensor(True)], "whole numbers, got True"),
        ([3.7], "whole numbers, got 3.7"),
        (np.array([3.0]), "whole numbers, got 3.0"),
        ([torch.tensor(3.0)], "whole numbers, got 3.0"),
        (["5"], "whole numbers, got '5'"),
        ([[5, 6]], r"whole numbers, got \[5, 6\]"),
        (torch.tensor([[5, 6]]), r"whole numbers, got \[5, 6\]"),
        ([None], "whole numbers, got None"),
        (b"abc", "str or a sequence of token ids, got bytes"),
        (None, "str or a sequence of token ids, got NoneType"),
        (5, "str or a sequence of token ids, got int"),
        (torch.tensor(5), "str or a sequence of token ids, got Tensor"),
        ({"input_ids": [5]}, "whole numbers, got 'input_ids'"),
        ([10], "token id 10 is out of the model's vocabulary"),
        ([-1], "token id -1 is out of the model's vocabulary"),
        ([1 << 70], "out of the model's vocabulary"),
    ],
)
def test_what_only_looks_like_ids_is_refused(ids, what):
    parts = Encoder(PromptTemplate(), None, 10)
    for take in (parts.ids, parts.chunk, parts.suffix, lambda given: Encoder(PromptTemplate(prefix=given), None, 10)):
        with pytest.raises(PromptError, match=what):
            take(ids)
