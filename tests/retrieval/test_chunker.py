import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkv import PromptTemplate
from ragkv.errors import DocumentError, RetrievalError
from ragkv.prompt import Encoder
from ragkv.retrieval import TokenChunker

from .conftest import PROSE, TOKENIZERS, byte_level

# Prose, structure and anything else that Unicode has.
PIECES = st.sampled_from(
    [
        "A sentence stands here. ",
        "another one? ",
        "\n\n",
        "\n",
        "# Head\n",
        "- item\n",
        "```\n",
        "```python\n\tif x:\n\n\t\treturn\n```\n",
        "\t",
        "\r\n \n",
        "\u2003\x85",
        "\0",
        "word ",
        "é😀",
        "他来了。",
        "x" * 70,
        "<|im_start|>",
        "</s>",
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=30), max_size=40).map("".join)


def count(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def bare(text):
    return "".join(text.split())


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, chunk_tokens=st.integers(8, 60))
def test_passages_fit_and_are_the_text(name, text, chunk_tokens):
    tokenizer = TOKENIZERS[name]
    chunker = TokenChunker(tokenizer, chunk_tokens)
    passages, spans = chunker.split(text), chunker.spans(text)
    encoder = Encoder(PromptTemplate(), tokenizer, 1 << 20)
    assert all(len(encoder.ids(passage)) <= chunk_tokens for passage in passages)
    assert bare("".join(passages)) == bare(text)
    assert [text[start:stop] for start, stop in spans] == passages
    assert all(passage == passage.strip() != "" for passage in passages)
    ends = [0, *(at for span in spans for at in span), len(text)]
    assert ends == sorted(ends)
    assert passages == TokenChunker(tokenizer, chunk_tokens).split(text)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
def test_tokens_are_counted_as_the_engine_reads_them(name, texts):
    encoder = Encoder(PromptTemplate(), TOKENIZERS[name], 1 << 20)
    assert TokenChunker(TOKENIZERS[name])._counts(texts) == [len(encoder.ids(text)) for text in texts]


def test_other_threads_have_no_say():
    """Padding, truncation and the reading of special tokens are state of a fast tokenizer, and anybody may set it."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"pad_token": "<|im_start|>"})
    text = " ".join(f"Sentence {i} has <|im_start|> in it." for i in range(40))
    spans = TokenChunker(tokenizer, 100).spans(text)
    tokenizer.backend_tokenizer.encode_special_tokens = False
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=200)
    before = tokenizer.backend_tokenizer.to_str()
    assert TokenChunker(tokenizer, 100).spans(text) == spans
    assert tokenizer.backend_tokenizer.to_str() == before


def test_sentences_stay_whole(tokenizer):
    text = " ".join(f"Sentence number {i} stands here." for i in range(40))
    passages = TokenChunker(tokenizer, 120).split(text)
    assert len(passages) > 1
    assert all(passage.startswith("Sentence") and passage.endswith("here.") for passage in passages)


def test_headings_begin_passages_and_keep_their_text():
    text = "\n\n".join(f"# Head {i}\n\nThe text of section {i} is this one. It has two sentences." for i in range(30))
    passages = TokenChunker(TOKENIZERS["byte-level"], 80).split(text)
    assert all(passage.startswith("# Head") and passage.endswith("sentences.") for passage in passages)


def test_a_sentence_that_would_be_cut_moves_to_the_next_passage():
    short, long = "Short one here.", "Long " + "word " * 30 + "end."
    tokenizer = TOKENIZERS["byte-level"]
    room = count(tokenizer, long) + 5
    assert TokenChunker(tokenizer, room).split(f"{short} {long} {long}") == [short, long, long]


def test_no_passage_of_a_few_words_is_left_at_the_end():
    tokenizer = TOKENIZERS["byte-level"]
    for sentences in range(12, 40):
        text = " ".join(f"Sentence {i} is here." for i in range(sentences))
        last = TokenChunker(tokenizer, 100).split(text)[-1]
        assert count(tokenizer, last) >= 20


@pytest.mark.parametrize("seed", range(12))
def test_an_edit_changes_passages_around_it_only(seed):
    rng = random.Random(seed)
    words = ["the", "harbour", "company", "sold", "nets", "rope", "tar", "boats", "letters", "story", "nobody"]
    sentences = [" ".join(rng.choices(words, k=rng.randint(5, 14))).capitalize() + "." for _ in range(600)]
    chunker = TokenChunker(TOKENIZERS["byte-level"], 128)
    before = chunker.split(" ".join(sentences))
    at = rng.randrange(100, 150)
    sentences[at : at + 1] = rng.choice([[], ["Something else."], [sentences[at], "One more sentence than there was."]])
    after = chunker.split(" ".join(sentences))
    first = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    same_end = next(i for i, (a, b) in enumerate(zip(before[::-1], after[::-1], strict=False)) if a != b)
    # Cut greedily, all behind the edit would change: three quarters of the text.
    assert len(after) - first - same_end <= 12
    assert len(before) > 60


def test_a_change_in_one_section_leaves_the_others():
    tokenizer = TOKENIZERS["byte-level"]
    sections = [f"# Section {i}\n\n" + " ".join(f"Fact {i}.{j} is told." for j in range(12)) for i in range(10)]
    chunker = TokenChunker(tokenizer, 150)
    before = chunker.split("\n\n".join(sections))
    sections[4] += " One more fact is told here, and it is long."
    after = chunker.split("\n\n".join(sections))
    assert len(set(after) - set(before)) <= 2


@pytest.mark.parametrize("text", ["", " \n\t\u2003"], ids=["empty", "blank"])
def test_no_text_no_passages(tokenizer, text):
    assert TokenChunker(tokenizer).split(text) == []


def test_special_tokens_in_a_text_are_text():
    tokenizer = TOKENIZERS["slow"]
    assert len(tokenizer("</s>" * 50, add_special_tokens=False)["input_ids"]) == 50
    passages = TokenChunker(tokenizer, 50).split("</s>" * 50)
    assert "".join(passages) == "</s>" * 50 and all(count(tokenizer, passage) <= 50 for passage in passages)
    assert count(tokenizer, "</s>") == 4


def test_prose_as_a_whole_is_one_passage(tokenizer):
    assert TokenChunker(tokenizer, 2000).split(PROSE) == [PROSE.strip()]


@pytest.mark.parametrize("chunk_tokens", [7, 0, -1, 2.5, True, None, "256"])
def test_bad_size_is_refused(chunk_tokens):
    with pytest.raises(RetrievalError, match="chunk_tokens must be a whole number of at least 8"):
        TokenChunker(TOKENIZERS["slow"], chunk_tokens)


def test_bad_text_is_refused(tokenizer):
    chunker = TokenChunker(tokenizer)
    with pytest.raises(DocumentError, match="must be a str, got bytes"):
        chunker.split(b"bytes")
    with pytest.raises(DocumentError, match="half a surrogate pair at 2"):
        chunker.split("ab\ud800")
    with pytest.raises(RetrievalError, match="must be a transformers tokenizer, got NoneType"):
        TokenChunker(None)


def test_a_character_that_cannot_fit_is_named():
    def nine_each(texts, **_):
        return {"input_ids": [[0] * 9 * len(text) for text in texts]}

    with pytest.raises(DocumentError, match="'a' alone has 9 tokens, chunk_tokens is 8"):
        TokenChunker(nine_each, 8).split("abc")


@pytest.mark.parametrize(
    "text",
    ["word " * 8_000, "x" * 30_000, "a,b,c\n" * 6_000, "A b. " * 8_000],
    ids=["words", "one word", "lines", "sentences"],
)
def test_long_text_of_one_kind(text):
    tokenizer = TOKENIZERS["byte-level"]
    passages = TokenChunker(tokenizer, 256).split(text)
    assert bare("".join(passages)) == bare(text)
    counts = [count(tokenizer, passage) for passage in passages]
    assert max(counts) <= 256
    assert sum(counts) / len(counts) > 110
