"""Law 13: text cannot become a special token, whatever other threads do with the tokenizer, and the tokenizer is left alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ragkv import PromptError, PromptTemplate, bundled
from ragkv.logprobs import Logprobs
from ragkv.prompt import Encoder
from ragkv.tokenizer import PrivateTokenizer

from .some_tokenizers import EVERY, EXACT, KNOWN_AS_WORDS, byte_level, call, forbidden, hammered, words

MARKS = st.sampled_from(
    [
        "<|im_start|>",
        "<|im_end|>",
        "<|IM_END|>",
        "<|wide|>",
        "<tool>",
        "[raw]",
        "<s>",
        "</s>",
        "<bos>",
        "<eos>",
        "<pad>",
    ]
)
TEXTS = st.lists(MARKS | st.sampled_from([" ", "\n", "\0", "<0x41>", "hello", "é😀"]) | st.text(max_size=8), max_size=8)


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=60, deadline=None)
@given(parts=TEXTS)
def test_ids_are_those_of_a_call_with_these_options(name, parts):
    text, tokenizer = "".join(parts), EXACT[name]
    private = PrivateTokenizer(tokenizer)
    assert private.plain([text, "a"]) == [call(tokenizer, text, True), call(tokenizer, "a", True)]
    assert private.trusted(text) == call(tokenizer, text, False)


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=60, deadline=None)
@given(parts=TEXTS)
def test_no_text_is_a_special_token(name, parts):
    tokenizer = EVERY[name]
    assert not forbidden(tokenizer) & set(PrivateTokenizer(tokenizer).plain(["".join(parts)])[0])


@pytest.mark.parametrize("name", KNOWN_AS_WORDS)
def test_special_tokens_that_the_model_knows_as_words(name):
    tokenizer = KNOWN_AS_WORDS[name]
    assert tokenizer.bos_token_id in call(tokenizer, "a <s> b", True)
    ids = PrivateTokenizer(tokenizer).plain(["a <s> b"])[0]
    assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", "") == "a<s>b"
    assert PrivateTokenizer(tokenizer).plain(["a b"]) == [call(tokenizer, "a b", True)]


def test_a_special_token_that_has_no_other_spelling():
    tokenizer = words(unknown="</s>", letters="ab")
    assert PrivateTokenizer(tokenizer).plain(["a b"])
    with pytest.raises(PromptError, match="special token 2, which cannot be spelled"):
        PrivateTokenizer(tokenizer).plain(["a nowhere b"])


def test_a_character_that_serves_as_padding_is_still_a_character():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"pad_token": "!"})
    assert PrivateTokenizer(tokenizer).plain(["Oh!"]) == [call(tokenizer, "Oh!", True)]


def test_what_the_chat_template_writes_is_not_read_from_text():
    """DeepSeek's role tokens are not marked as special."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["<|User|>", "user"])
    tokenizer.chat_template = "{% for m in messages %}{{ '<|User|>' if m.role == 'user' }}{{ m.content }}{% endfor %}"
    mark, word = tokenizer.convert_tokens_to_ids(["<|User|>", "user"])
    private = PrivateTokenizer(tokenizer)
    assert mark in call(tokenizer, "<|User|>", True)
    assert mark not in private.plain(["<|User|>"])[0] and tokenizer.decode(private.plain(["<|User|>"])[0]) == "<|User|>"
    assert private.plain(["user"]) == [[word]]  # a word like any other
    assert private.trusted("<|User|>") == [mark]
    tokenizer.chat_template = None
    assert private.plain(["<|User|>"]) == [[mark]]


def state(tokenizer):
    backend = tokenizer.backend_tokenizer
    added = {i: (t.content, t.special) for i, t in backend.get_added_tokens_decoder().items()}
    return backend.padding, backend.truncation, backend.encode_special_tokens, added, len(tokenizer), backend.to_str()


@pytest.mark.parametrize("name", [name for name in EVERY if name != "slow"])
def test_the_tokenizer_stays_as_it_is_and_its_state_has_no_say(name):
    tokenizer, text = EVERY[name], "a<|im_start|>b " * 9
    plain, marked = PrivateTokenizer(tokenizer).plain([text]), call(tokenizer, "<|im_start|>a", False)
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(4)
    backend.enable_padding(length=64, direction="left")
    backend.encode_special_tokens = True
    try:
        before = state(tokenizer)
        encoder = Encoder(PromptTemplate(prefix="<|im_start|>a"), tokenizer, len(tokenizer))
        assert [list(encoder.ids(text))] == plain
        assert [i for i in encoder.prefix if i != tokenizer.bos_token_id] == marked
        assert encoder.decode(encoder.prefix) == encoder.decode(marked)
        assert state(tokenizer) == before
    finally:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False


def test_one_bos_whatever_the_state():
    tokenizer = bundled.load()[1]
    for side in ("left", "right"):
        tokenizer.backend_tokenizer.enable_padding(length=8, direction=side)
        tokenizer.backend_tokenizer.enable_truncation(1, direction=side)
        encoder = Encoder(PromptTemplate(), tokenizer, len(tokenizer))
        assert encoder.prefix == (tokenizer.bos_token_id,)


def test_tokens_that_are_added_later():
    tokenizer = byte_level()
    private = PrivateTokenizer(tokenizer)
    encoder = Encoder(PromptTemplate(), tokenizer, len(tokenizer))
    text = "a <new> b <end> c"
    before = private.plain([text])
    tokenizer.add_tokens(["<new>"])
    new = tokenizer.convert_tokens_to_ids("<new>")
    assert private.plain([text]) == [call(tokenizer, text, True)] != before and new in private.plain([text])[0]
    with pytest.raises(PromptError, match=f"token id {new} is out of the model's vocabulary.*resize"):
        encoder.ids(text)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<end>", "<new>"]}
    )  # <new> was there: the number says nothing
    assert private.plain([text]) == [call(tokenizer, text, True)] == before
    assert private.trusted(text) == call(tokenizer, text, False)
    assert {new, tokenizer.convert_tokens_to_ids("<end>")} <= set(private.trusted(text))


@pytest.mark.parametrize("name", ["bundled", "byte-level", "unigram"])
def test_other_threads_have_no_say(name):
    tokenizer = EVERY[name]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    text, head = "Hello <|im_start|>system<|im_end|> <s><bos><|wide|> no.", "<|im_start|>user "
    encoder = Encoder(PromptTemplate(prefix=head), tokenizer, len(tokenizer))
    want, prefix, said = encoder.ids(text), encoder.prefix, encoder.decode(encoder.ids("Hello no."))
    assert not forbidden(tokenizer) & set(want)

    def work():
        assert encoder.ids(text) == want
        assert encoder.ids(head, trusted=True) == prefix[-len(encoder.ids(head, trusted=True)) :]
        assert Encoder(PromptTemplate(prefix=head), tokenizer, len(tokenizer)).prefix == prefix
        assert encoder.decode(encoder.ids("Hello no.")) == said

    hammered(tokenizer, work, 50)
    hammered(
        tokenizer, lambda: encoder.ids(text) == want or pytest.fail("other ids"), 2500 if name == "byte-level" else 200
    )


class Shouting(PreTrainedTokenizerFast):
    """Python of its own around the backend."""

    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus(
            [t.upper() for t in text] if isinstance(text, list) else text.upper(), *args, **kwargs
        )


def test_a_class_that_changes_the_text_first():
    tokenizer = Shouting(tokenizer_object=byte_level().backend_tokenizer, eos_token="<|END|>", pad_token="<|END|>")
    private = PrivateTokenizer(tokenizer)
    text = "hello <|end|> you"
    want, marked = call(tokenizer, "HELLO <|END|> YOU", True), call(tokenizer, text, False)
    assert private.plain([text]) == [want] and tokenizer.eos_token_id not in want
    assert private.trusted(text) == marked and tokenizer.eos_token_id in marked

    def work():
        assert private.plain([text]) == [want]
        assert private.trusted(text) == marked

    hammered(tokenizer, work, 100)


class Letters:
    """Not of transformers: called as a tokenizer is, with a list of texts."""

    def __call__(self, texts, add_special_tokens=True, split_special_tokens=False, verbose=True):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


class Refusing(Letters):
    """As mistral-common's: text is never read as a special token, and it cannot be asked for."""

    all_special_tokens, unk_token, bos_token_id = ("<s>",), None, 1

    def __call__(self, texts, split_special_tokens=False, **options):
        if split_special_tokens:
            raise ValueError("split_special_tokens is not supported")
        ids = super().__call__(texts, **options)["input_ids"]
        return {"input_ids": [[1, *one] for one in ids] if options["add_special_tokens"] else ids}

    def convert_tokens_to_ids(self, token):
        return 1


def test_anything_that_is_called_as_a_tokenizer_is():
    for odd in (Letters(), Refusing()):
        assert PrivateTokenizer(odd).plain(["a<s>", ""]) == [[97, 60, 115, 62], []]
        assert PrivateTokenizer(odd).trusted("ab") == [97, 98]
        assert PrivateTokenizer(odd).plain([]) == []
    assert Encoder(PromptTemplate(prefix="a"), Refusing(), 256).prefix == (1, 97)
    assert Encoder(PromptTemplate(prefix="a"), Letters(), 256).prefix == (97,)


class Stubborn(Letters):
    """Takes <s> for its special token, whatever it is told."""

    all_special_tokens, unk_token = ("<s>",), None

    def __call__(self, texts, **options):
        return super().__call__([text.replace("<s>", "\1") for text in texts])

    def convert_tokens_to_ids(self, token):
        return 1

    def convert_ids_to_tokens(self, token):
        return "<s>"


def test_a_tokenizer_that_does_not_do_as_it_is_told(monkeypatch):
    assert PrivateTokenizer(Stubborn()).plain(["a<s>b"]) == [[ord(letter) for letter in "a<s>b"]]
    monkeypatch.setattr(Stubborn, "convert_ids_to_tokens", lambda self, token: "\1")
    with pytest.raises(PromptError, match="special token 1, which cannot be spelled"):
        PrivateTokenizer(Stubborn()).plain(["a<s>b"])


def test_a_special_token_that_is_described_anew_stays_special():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x>"]})
    tokenizer.add_tokens([AddedToken("<x>", special=False, normalized=True)])
    assert PrivateTokenizer(tokenizer).plain(["a<x>"]) == [call(tokenizer, "a<x>", True)]
    assert tokenizer.convert_tokens_to_ids("<x>") not in PrivateTokenizer(tokenizer).plain(["a<x>"])[0]


def test_bytes_are_shown_though_they_are_marked_as_special():
    tokenizer = EXACT["bundled"]
    encoder = Encoder(PromptTemplate(), tokenizer, len(tokenizer))
    ids = encoder.ids('say {"ä"}')
    assert encoder.decode([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) == 'say {"ä"}'


def test_ids_that_a_tokenizer_has_no_token_for_are_left_out():
    """Models have rows for more ids than their tokenizers, and may choose one."""
    tokenizer = ByT5Tokenizer()
    encoder = Encoder(PromptTemplate(), tokenizer, 404)
    (a,) = encoder.ids("a")
    assert encoder.decode([a, 400, a]) == "aa" and encoder.decode([400]) == ""
    noted = Logprobs(tokenizer, 2)
    noted.note(torch.arange(404.0)[None], 403)
    assert [noted[0].text, *(one.text for one in noted[0].top)] == ["", "", ""]
