"""Going on from an answer: what was said stays where it is, and is what one full prefill of the conversation computes."""

from functools import partial

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ragkv import (
    ArgumentError,
    ConversationError,
    DeadlineError,
    Engine,
    FullPrefill,
    ModelChangedError,
    PromptTemplate,
    PromptTooLongError,
    Reuse,
    prompting,
)
from ragkv.bundled import MODEL_PATH
from ragkv.testing import ARCHITECTURES, random_ids, tiny_model

from .conftest import Seen, full

EXACT = 1e-4
TEMPLATE = PromptTemplate(
    prefix=[1, 5, 6], after_chunk=[10], before_question=[11], after_question=[12, 13], after_answer=[14, 15]
)
WORDS = PromptTemplate(
    prefix="Read.\n", after_chunk="\n", before_question="Q:", after_question="\nA:", after_answer="\n"
)
NO_END = {"max_new_tokens": 5, "eos_token_id": None}


def talk(engine, turns, **options):
    """Answers, and what each of their steps saw."""
    past, answers, seen = None, [], Seen()
    for chunks, question in turns:
        answers.append(
            engine.generate(chunks, question, past=past, keep_past=True, logits_processor=[seen], **NO_END, **options)
        )
        past = answers[-1].past
    return answers, seen.steps


@pytest.fixture(scope="module")
def words():
    return PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_conversation_is_one_full_prefill(architecture):
    engine = Engine(tiny_model(architecture), template=TEMPLATE, piece_tokens=16)
    document = engine.add_document([random_ids(n) for n in (13, 22, 30)])
    lone = engine.add([random_ids(17), random_ids(20)])
    turns = [
        ([lone[0], document[1]], random_ids(9)),
        ([document[2], lone[1]], random_ids(8)),
        ([], random_ids(7)),
        ([document[0]], random_ids(6)),
    ]
    for method in (FullPrefill(), "cache-blend:ratio=1.0", "lego-link:k=1000"):
        answers, steps = talk(engine, turns, method=method)
        for ids, scores in steps:
            assert float((scores - full(engine.model, ids)).abs().max()) < EXACT, (method, ids.shape)
        said = [1, 5, 6]
        for (chunks, question), answer in zip(turns, answers, strict=True):
            said += [*(i for chunk in chunks for i in chunk.ids), 11, *question, 12, 13, *answer.token_ids]
            assert list(answer.past.ids) == said
            assert answer.past.held == len(said) - 1
            said += [14, 15]
    _, steps = talk(engine, turns, method=Reuse())  # the check above can fail
    assert float((steps[-1][1] - full(engine.model, steps[-1][0])).abs().max()) > 50 * EXACT


def test_what_was_said_stays_where_it_is_and_is_not_computed_again():
    model = tiny_model()
    engine = Engine(model, template=TEMPLATE, method=Reuse())
    chunks, runs = engine.add([random_ids(17), random_ids(20)]), []
    first = engine.generate(chunks[:1], random_ids(9), keep_past=True, **NO_END)
    held = [layer.key_room[:, :, : first.past.held].clone() for layer in first.past.cache.layers]
    model.base_model.register_forward_pre_hook(
        lambda _, args, kw: runs.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    for more in (chunks[1:], []):
        del runs[:]
        second = engine.generate(more, random_ids(8), past=first.past, **NO_END)
        tokens = second.report.fusion.tokens
        fresh = 1 + 2 + 1 + 8 + 2  # the answer's last token, what stands behind it, the question in its own
        assert tokens == {"reused": first.past.held, "placed": sum(map(len, more)), "recomputed": 0, "fresh": fresh}
        assert sum(runs) == fresh + 4, "and the new answer's tokens but the last"
        assert second.past.cache is first.past.cache and second.past.turns[: len(first.past.turns)] == first.past.turns
        for layer, before in zip(first.past.cache.layers, held, strict=True):
            assert torch.equal(layer.key_room[:, :, : first.past.held], before)
    read = engine.generate(chunks[1:], random_ids(8), past=first.past, max_new_tokens=1)
    assert read.report.fusion.hits == {"cpu": 1}


def test_an_answer_keeps_nothing_unasked():
    engine = Engine(tiny_model(), template=TEMPLATE, method=Reuse())
    assert engine.generate([], random_ids(9), max_new_tokens=2).past is None
    assert engine.fuse([], random_ids(9)).past is None


def test_an_interrupted_turn_leaves_its_past(monkeypatch):
    engine = Engine(tiny_model(), template=PromptTemplate(prefix=[1]))
    past = engine.generate([random_ids(9)], random_ids(5), max_new_tokens=2, keep_past=True).past

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ragkv.past.Event", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([], random_ids(5), past=past, max_new_tokens=2)
    assert engine.generate([], random_ids(5), past=past, max_new_tokens=2).past


@pytest.mark.parametrize("refused", range(1, 5))
def test_a_turn_for_which_there_is_no_memory_leaves_its_past(monkeypatch, refused):
    engine = Engine(tiny_model(), template=TEMPLATE)
    past = engine.generate([random_ids(9)], random_ids(5), keep_past=True, **NO_END).past
    want = engine.generate([], random_ids(90), past=past, keep_past=True, **NO_END)
    past = engine.generate([random_ids(9)], random_ids(5), keep_past=True, **NO_END).past
    asked, new_empty = [], torch.Tensor.new_empty

    def once(self, *size, **options):
        asked.append(size)
        if len(asked) == refused:
            raise torch.OutOfMemoryError("no memory")
        return new_empty(self, *size, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", once)
        with pytest.raises(torch.OutOfMemoryError):
            engine.generate([], random_ids(90), past=past, **NO_END)
    engine.generate([], random_ids(3), past=past, **NO_END)
    assert len({layer.key_room.shape[2] for layer in past.cache.layers}) == 1  # kernels take all layers as one
    assert engine.generate([], random_ids(90), past=past, **NO_END).token_ids == want.token_ids


def test_a_turn_that_never_began_takes_nothing_from_another():
    engine = Engine(tiny_model(), template=TEMPLATE)
    past = engine.generate([random_ids(9)], random_ids(5), keep_past=True, **NO_END).past
    one = engine.generate([], random_ids(3), past=past, keep_past=True, **NO_END)
    with pytest.raises(DeadlineError):
        engine.generate([], random_ids(4), past=past, deadline_s=1e-9, **NO_END)
    assert engine.generate([], random_ids(4), past=one.past, **NO_END).token_ids


def test_streams_and_whole_answers_go_on_alike(words):
    engine = Engine(tiny_model(vocab_size=1792), words, template=WORDS, method=Reuse())
    stream = engine.stream(["Mira Lund runs the mill."], "Who?", keep_past=True, **NO_END)
    text = "".join(stream)
    whole = engine.generate(["Mira Lund runs the mill."], "Who?", keep_past=True, **NO_END)
    assert (whole.text, whole.past.ids, whole.past.held) == (text, stream.past.ids, stream.past.held)
    again = engine.stream([], "When?", past=stream.past, **NO_END)
    assert "".join(again) == engine.generate([], "When?", past=whole.past, **NO_END).text


def test_one_caller_at_a_time(words):
    engine = Engine(tiny_model(vocab_size=1792), words, template=WORDS, method=Reuse())
    past = engine.generate(["Mira Lund runs the mill."], "Who?", keep_past=True, **NO_END).past
    want = engine.generate([], "When?", past=past, **NO_END).token_ids
    stream = engine.stream([], "When?", past=past, **NO_END)
    next(stream)
    with pytest.raises(ConversationError, match=r"one caller at a time. Wait for it, or end or close\(\) its stream"):
        engine.generate([], "When?", past=past, **NO_END)
    stream.close()
    stream.close()
    assert stream.past is None and list(stream) == []
    answer = engine.generate([], "When?", past=past, **NO_END)
    assert answer.token_ids == want


def test_a_fork_beside_somebody_who_goes_on(forked_amid):
    engine = Engine(tiny_model(), template=TEMPLATE)
    past = engine.generate([random_ids(9)], random_ids(5), keep_past=True, **NO_END).past
    answer, question = partial(engine.generate, past=past, **NO_END), random_ids(6)
    said = forked_amid(lambda: answer([], random_ids(4)), prompting, "fuse", lambda: answer([], question).token_ids)
    assert said == str(answer([], question).token_ids)


def test_a_turn_in_the_place_of_another(words):
    """Both ways from one turn lead through the same slots: who was overwritten is told so."""
    engine = Engine(tiny_model(vocab_size=1792), words, template=WORDS, method=Reuse())
    past = engine.generate(["Mira Lund runs the mill."], "Who?", keep_past=True, **NO_END).past
    one = engine.generate([], "When?", past=past, **NO_END)
    other = engine.generate([], "Where is it?", past=past, **NO_END)
    with pytest.raises(ConversationError, match="went on from an earlier turn in its place"):
        engine.generate([], "Why?", past=one.past, **NO_END)
    assert engine.generate([], "Why?", past=other.past, **NO_END).past.ids[: len(other.past.ids)] == other.past.ids
    assert engine.generate([], "When?", past=past, **NO_END).token_ids == one.token_ids


def test_a_turn_that_fails_leaves_the_past_as_it_was(words):
    engine = Engine(tiny_model(vocab_size=1792, max_position_embeddings=96), words, template=WORDS, method=Reuse())
    past = engine.generate(["Mira Lund runs the mill."], "Who?", keep_past=True, **NO_END).past
    want = engine.generate([], "When?", past=past, **NO_END).token_ids

    def broken(ids, scores):
        if ids.shape[1] > len(past.ids) + 14:
            raise RuntimeError("out of memory")
        return scores

    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(["It lies on the Aire."], "When?", past=past, logits_processor=[broken], **NO_END)
    with pytest.raises(PromptTooLongError):
        engine.generate(["It lies on the Aire. " * 8], "When?", past=past, **NO_END)
    assert engine.generate([], "When?", past=past, **NO_END).token_ids == want


@pytest.mark.parametrize("early", [False, True])
def test_stop_texts_and_end_tokens_are_no_part_of_what_was_said(words, early):
    """Nor is what was run behind them, where a token's step begins before the token is known."""
    how = {"kernels": "reference", "graphs": True} if early else {}
    engine = Engine(tiny_model(vocab_size=1792), words, template=WORDS, method=Reuse(), **how)
    if early:
        engine.documents.steps.graphs.early = True
    plain = engine.generate([], "Who?", keep_past=True, max_new_tokens=6, eos_token_id=None)
    front = plain.past.ids[: len(plain.past.ids) - 6]
    ended = engine.generate([], "Who?", keep_past=True, max_new_tokens=6, eos_token_id=plain.token_ids[3])
    assert ended.token_ids == plain.token_ids[: plain.token_ids.index(plain.token_ids[3]) + 1]
    assert ended.past.ids == (*front, *ended.token_ids[:-1]) and ended.past.held == len(ended.past.ids)
    text = words.decode(plain.token_ids)
    for at in range(1, len(text) - 1):
        stopped = engine.generate(
            [], "Who?", keep_past=True, max_new_tokens=6, eos_token_id=None, stop=text[at : at + 2]
        )
        said = stopped.past.ids[len(front) :]
        kept = stopped.past.held - len(front)
        assert engine.encoder.decode(said).replace(" ", "") == stopped.text.replace(" ", "")
        assert list(said[:kept]) == plain.token_ids[:kept] and kept <= len(stopped.token_ids) - 1
        again = engine.generate([], "When?", past=stopped.past, max_new_tokens=1)
        assert again.past.ids[: len(stopped.past.ids)] == stopped.past.ids


def test_another_model_does_not_go_on(words):
    model = tiny_model(vocab_size=1792)
    engine = Engine(model, words, template=WORDS, method=Reuse())
    past = engine.generate(["Mira Lund runs the mill."], "Who?", keep_past=True, **NO_END).past
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    for _ in range(2):  # noticed when the model is taken, and known from then on
        with pytest.raises(ModelChangedError, match="changed"):
            engine.generate([], "When?", past=past, **NO_END)


def test_what_a_past_does_not_go_with(words):
    engine = Engine(tiny_model(vocab_size=1792), words, template=WORDS, method=Reuse())
    past = engine.generate([], "Who?", keep_past=True, namespace="a", system="Be brief.", **NO_END).past
    assert past.namespace == "a" and past.anchor != engine.encoder.anchor
    for more in ({"system": "x"}, {"namespace": "b"}):
        with pytest.raises(ArgumentError, match="the past has its system message, namespace"):
            engine.generate([], "When?", past=past, **more)
    with pytest.raises(ArgumentError, match="give the next question alone"):
        engine.generate([], [{"role": "user", "content": "When?"}], past=past)
    with pytest.raises(ArgumentError, match="beams leave no cache"):
        engine.generate([], "When?", past=past, num_beams=2)


def test_inference_mode_may_begin_and_end_within_a_conversation_and_an_answer(words):
    """Its tensors may be written to in it alone: one caller's handler may be in it, and another's not."""
    engine = Engine(tiny_model(vocab_size=len(words)), words, template=WORDS, method=FullPrefill())
    plain = engine.generate(["a passage"], "what?", keep_past=True, **NO_END)
    want = engine.generate(["another passage"], "why?", past=plain.past, **NO_END)
    with torch.inference_mode():
        first = engine.generate(["a passage"], "what?", keep_past=True, **NO_END)
        pieces = engine.stream(["a passage"], "what?", **NO_END)
        begun = next(pieces)
    assert begun + "".join(pieces) == first.text == plain.text
    second = engine.generate(["another passage"], "why?", past=first.past, keep_past=True, **NO_END)
    assert second.token_ids == want.token_ids
    with torch.inference_mode():
        third = engine.generate([], "when?", past=second.past, **NO_END)
    engine.generate([], "and then?", past=third.past, **NO_END)
