"""Streams: pieces joined are the text, characters come whole, and an answer ends before a stop text."""

import random
import threading

import pytest
import torch
from tokenizers import decoders, models, pre_tokenizers

from ragkv import ArgumentError, Engine, NonFiniteError, PromptTemplate, RagKVError, Reuse, bundled
from ragkv.detokenizer import Detokenizer, cut
from ragkv.prompt import Encoder
from ragkv.testing import random_ids, tiny_model
from tests.some_tokenizers import EVERY, byte_level, fast, metaspace

from .conftest import QUESTION, TEMPLATE
from .test_generation import Heard


def word_pieces():
    vocab = {t: at for at, t in enumerate(["[UNK]", "it", "'", "s", "is", "n", "##t", "##s", ".", ",", "ve", "?"])}
    pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(models.WordPiece(vocab, unk_token="[UNK]"), pre_tokenizer, decoders.WordPiece(cleanup=False))


def cleaning():
    tokenizer = word_pieces()
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


def forced():
    """BPE that takes spaces out of the text all the same."""
    tokenizer = byte_level(clean_up_tokenization_spaces=True)
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return tokenizer


def metaspace_decoded():
    tokenizer = metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


TOKENIZERS = {
    **EVERY,
    "word pieces": word_pieces(),
    "cleaning": cleaning(),
    "forced": forced(),
    "decoded": metaspace_decoded(),
}


def encoder(tokenizer):
    return Encoder(PromptTemplate(), tokenizer, len(tokenizer))


def pieces(tokenizer, ids, stop=()):
    text, found = Detokenizer(encoder(tokenizer), stop), []
    for token in ids:
        found.append(text.add(token))
        if text.stopped:
            break
    return [*found, text.rest()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_joined_are_the_text(name):
    tokenizer = TOKENIZERS[name]
    chosen = random.Random(0)
    special = list(tokenizer.added_tokens_decoder)
    for _ in range(150):
        ids = chosen.choices(range(len(tokenizer)), k=chosen.randrange(40))
        ids = [chosen.choice(special) if special and chosen.random() < 0.1 else i for i in ids]
        text = encoder(tokenizer).decode(ids)
        assert "".join(pieces(tokenizer, ids)) == text
        stops = [text[at : at + chosen.randint(1, 5)] for at in chosen.choices(range(len(text) or 1), k=2)]
        stops = [stop for stop in stops if stop]
        assert "".join(pieces(tokenizer, ids, stops)) == cut(text, stops)


@pytest.mark.parametrize("name", ["byte-level", "slow", "decoded"])
def test_characters_come_whole(name):
    tokenizer, text = TOKENIZERS[name], "na 東京 d\N{PILE OF POO} é e"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(ids) > len(text)
    assert sum(map(bool, found)) > 4
    assert not any("\ufffd" in piece for piece in found)
    assert "東京" in "".join(found) == encoder(tokenizer).decode(ids)


@pytest.mark.parametrize("cleans", [False, True])  # which transformers does not do to BPE
def test_an_id_is_decoded_with_its_neighbours_alone(monkeypatch, cleans):
    tokenizer = byte_level(clean_up_tokenization_spaces=cleans)
    parts, sizes = encoder(tokenizer), []
    decode = parts.decode
    monkeypatch.setattr(parts, "decode", lambda ids: (sizes.append(len(ids)), decode(ids))[1])
    text = Detokenizer(parts)
    for token in tokenizer("some quite ordinary text, é say, " * 20, add_special_tokens=False)["input_ids"]:
        text.add(token)
    assert 1 < max(sizes) <= 4


def test_nothing_of_a_stop_text_is_shown():
    tokenizer = byte_level()
    ids = tokenizer("Nils Holm\n\nQuestion: no\n\nQues", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokenizer, ids, ["\n\nQuestion:"])) == "Nils Holm"
    shown = Detokenizer(encoder(tokenizer), ["\n\nQuestion:"])
    seen = ""
    while not shown.stopped:
        seen += shown.add(ids.pop(0))
        assert "Nils Holm".startswith(seen)
    # what only began like one is shown when the answer is over
    tail = tokenizer("yes\n\nQues", add_special_tokens=False)["input_ids"]
    assert pieces(tokenizer, tail, ["\n\nQuestion:", "s\n!"])[-1] == "s\n\nQues"[1:]


class Says:
    """Logits processors that make a model say these ids."""

    def __init__(self, ids):
        self.ids, self.said = ids, 0

    def __call__(self, input_ids, scores):
        scores[:] = -torch.inf
        scores[:, self.ids[self.said]] = 0
        self.said += 1
        return scores


@pytest.fixture(scope="module")
def base():
    """A model without a chat template, behind the plain form."""
    model, tokenizer = bundled.load()
    tokenizer.chat_template = None
    return Engine(model, tokenizer, method=Reuse())


def answers(engine, text, **arguments):
    """What generate and stream make of a model that says this."""
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    arguments = {"max_new_tokens": len(ids), "eos_token_id": None, **arguments}
    answer = engine.generate(["A passage."], "who?", logits_processor=[Says(ids)], **arguments)
    stream = engine.stream(["A passage."], "who?", logits_processor=[Says(ids)], **arguments)
    assert "".join(stream) == answer.text
    assert stream.token_ids == answer.token_ids == ids[: len(answer.token_ids)]
    assert stream.report.new_tokens == answer.report.new_tokens == len(answer.token_ids)
    return answer.text.strip(), len(answer.token_ids) < len(ids)


RUN_ON = "Nils Holm\n\nQuestion: What else?\nAnswer: Nothing at all."


def test_the_plain_form_ends_before_its_next_question(base):
    assert answers(base, RUN_ON) == ("Nils Holm", True)
    assert answers(base, RUN_ON.replace("\n", " ")) == ("Nils Holm", True)
    assert answers(base, "Nils Holm asked a Quest") == ("Nils Holm asked a Quest", False)
    bare = Engine(base.model, base.tokenizer, method=Reuse(), template=PromptTemplate(prefix="Read."))
    assert answers(bare, RUN_ON)[1] is False


def test_stop_texts_of_the_call_and_stop_strings_of_transformers(base):
    assert answers(base, RUN_ON, stop="Holm") == ("Nils", True)
    assert answers(base, RUN_ON, stop=["What", "il"]) == ("N", True)
    assert answers(base, RUN_ON, stop_strings=["Holm"]) == ("Nils Holm", True)
    assert answers(base, RUN_ON, stop_strings=["What"]) == ("Nils Holm", True)
    assert answers(base, "a b Holm c", stop_strings=["Holm"], stop="b") == ("a", True)


def test_beams_end_there_too(base):
    said = {"max_new_tokens": 12, "num_beams": 2, "eos_token_id": None}
    whole = base.generate(["A passage."], "who?", **said)
    end = whole.text.strip()[3:6]
    ended = base.generate(["A passage."], "who?", stop=end, **said)
    assert end in whole.text and end not in ended.text
    assert len(ended.token_ids) <= len(whole.token_ids)


def test_a_streamer_hears_the_end_at_a_stop_text(base):
    heard = Heard()
    answers(base, RUN_ON, streamer=heard)
    assert heard.said.count("end") == 2 and heard.said[-1] == "end"


@pytest.mark.parametrize("stop", ["", ["x", ""], [7], [b"x"]])
def test_stop_texts_that_are_none(base, stop):
    with pytest.raises(ArgumentError, match="stop must be a text or several"):
        base.generate(["A passage."], "who?", stop=stop)
    with pytest.raises(ArgumentError, match="stop must be"):
        base.stream(["A passage."], "who?", stop=stop)


def test_stop_texts_need_a_tokenizer():
    engine = Engine(tiny_model(), template=TEMPLATE, method=Reuse())
    with pytest.raises(ArgumentError, match="no tokenizer"):
        engine.generate([random_ids(9)], QUESTION, stop="x")


class Spoils:
    """A logits processor whose score is not finite from some token on."""

    def __init__(self, value, after):
        self.value, self.after = value, after

    def __call__(self, input_ids, scores):
        self.after -= 1
        if self.after < 0:
            scores[:] = self.value
        return scores


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_are_no_answer(base, value, sample):
    stream = base.stream(
        ["A passage."], "who?", logits_processor=[Spoils(value, 2)], do_sample=sample, eos_token_id=None
    )
    with pytest.raises(NonFiniteError, match=r"best score of a next token is -?(nan|inf).*float32"):
        list(stream)
    assert len(stream.token_ids) == 2
    for beams in (1, 2):
        spoils = {"logits_processor": [Spoils(value, 0)], "num_beams": beams, "max_new_tokens": 3}
        with pytest.raises(NonFiniteError):
            base.generate(["A passage."], "who?", **spoils, do_sample=sample)


def test_a_model_that_overflows_gives_no_answer():
    model = tiny_model()
    engine = Engine(model, template=TEMPLATE, method=Reuse())
    chunks = engine.add([random_ids(9)])
    model.model.layers[2].mlp.down_proj.register_forward_hook(lambda module, args, out: out * torch.inf)
    for ask in (engine.fuse, engine.generate):
        with pytest.raises(NonFiniteError, match=r"next-token logits are not finite.*dtype=torch\.float32"):
            ask(chunks, QUESTION)


def test_a_stream_is_for_one_thread_at_a_time(base):
    """Who reads it, or closes it, while another makes a piece is told so; the one that reads goes on."""
    failures = list[Exception]()

    def meddling(ids, scores):
        def meddle(what):
            with pytest.raises(RagKVError, match="one thread at a time") as failure:
                what()
            failures.append(failure.value)

        for what in (lambda: next(stream), stream.close):
            thread = threading.Thread(target=meddle, args=(what,))
            thread.start()
            thread.join()
        return scores

    want = base.generate([], "Who?", max_new_tokens=3).text
    stream = base.stream([], "Who?", max_new_tokens=3, logits_processor=[meddling])
    assert "".join(stream) == stream.text == want
    assert len(failures) == 6
    stream.close()
