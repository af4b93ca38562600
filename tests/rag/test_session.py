"""Sessions: earlier turns stay where they are, the next one knows of them, and whatever goes wrong changes nothing."""

import asyncio
import copy
import threading

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ragkv import (
    ArgumentError,
    ArgumentTypeError,
    ConversationError,
    FullPrefill,
    PromptTemplate,
    PromptTooLongError,
    RagKVError,
    RetrievalError,
    Reuse,
    UnknownArgumentError,
)
from ragkv.bundled import MODEL_PATH
from ragkv.testing import tiny_model
from tests.engine.conftest import Seen, full

from .rags import DOCUMENTS, QUESTION, open_rag

NEXT, THIRD = "Who is its harbour master?", "Since when?"
SHORT = {"top_k": 2, "max_new_tokens": 4, "eos_token_id": None}
LONG = {"top_k": 2, "max_new_tokens": 400, "min_new_tokens": 400}
CHAT = (
    "{{ bos_token }}{% for m in messages %}<eos>{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<eos>assistant:{% endif %}"
)


def state(session):
    return session._state


def spread(rag):
    rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
    return rag


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt_oss", "cohere2", "qwen3"])
def test_a_session_is_one_full_prefill_of_the_conversation(architecture):
    with spread(open_rag(model=tiny_model(architecture, vocab_size=1792))) as rag:
        seen, session = Seen(), rag.session()
        answers = [
            session.ask(question, method=FullPrefill(), logits_processor=[seen], **SHORT)
            for question in (QUESTION, NEXT, THIRD)
        ]
        for ids, scores in seen.steps:
            logits = full(rag.engine.model, ids)
            assert float((scores - logits).abs().max()) < 1e-4
            assert logits.argmax() == scores.argmax()
        assert seen.steps[-1][0].shape[1] > seen.steps[4][0].shape[1] > seen.steps[0][0].shape[1]
        assert [answer.report.fusion.tokens["reused"] > 0 for answer in answers] == [False, True, True]


@pytest.mark.parametrize("written", [None, CHAT], ids=["plain", "chat"])
def test_earlier_turns_stay_where_they_are(model, written):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
    tokenizer.chat_template = written
    with spread(open_rag(model=model, template=PromptTemplate.default(tokenizer), tokenizer=tokenizer)) as rag:
        session, runs = rag.session(), []
        first = session.ask(QUESTION, **SHORT)
        held = [layer.keys.clone() for layer in state(session).past.cache.layers]
        model.base_model.register_forward_pre_hook(
            lambda _, args, kw: runs.append(kw["input_ids"].shape[1]), with_kwargs=True
        )
        second = session.ask(NEXT, **SHORT)
        tokens, past = second.report.fusion.tokens, state(session).past
        assert tokens["reused"] == held[0].shape[2]
        assert sum(runs) == tokens["fresh"] + 3, "nothing but what is new was run: the question, and the answer"
        for layer, before in zip(past.cache.layers, held, strict=True):
            assert torch.equal(layer.keys[:, :, : before.shape[2]], before)
        assert session.messages == [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": NEXT},
            {"role": "assistant", "content": second.text},
        ]
        text = tokenizer.decode(past.ids).replace(" ", "")
        assert text.index(QUESTION.replace(" ", "")) < text.index(NEXT.replace(" ", ""))
        if written:
            assert text.count("<eos>user:") == text.count("<eos>assistant:") == 2


def test_passages_are_not_placed_twice(rag):
    session = rag.session(rewrite=lambda messages: messages[-1]["content"])
    first, again = (session.ask(QUESTION, **SHORT) for _ in range(2))
    assert again.sources == first.sources and len(again.sources) == 2
    assert first.report.fusion.tokens["placed"] > 0 == again.report.fusion.tokens["placed"]
    more = session.ask(QUESTION, **{**SHORT, "top_k": 4})
    assert len(more.sources) == 4 and sum(more.report.fusion.hits.values()) == 2


def test_each_source_is_told_with_where_its_kv_came_from(rag):
    session = rag.session(rewrite=lambda messages: messages[-1]["content"])
    there = session.ask(QUESTION, **SHORT).sources
    hits = rag.retrieve(QUESTION, 6)
    new = [hit for hit in hits if hit.passage_id not in {earlier.passage_id for earlier in there}]
    lost = new[-1]
    assert rag.engine.store.remove_many(list(rag.engine.documents.keys(rag.chunks([lost])))) == 1
    answer = session.ask(QUESTION, **{**SHORT, "top_k": 6})
    known = {**dict.fromkeys((hit.passage_id for hit in there), "prompt"), lost.passage_id: "computed"}
    want = [known.get(hit.passage_id, "cpu") for hit in hits]
    assert [hit.passage_id for hit in answer.sources] == [hit.passage_id for hit in hits]
    assert set(want) == {"prompt", "cpu", "computed"} and answer.report.fusion.sources == want


def test_the_next_question_is_looked_up_with_the_conversation_in_mind(rag):
    assert "clearport.md" not in {hit.source for hit in rag.retrieve("And who is master there?", 2)}
    session, looked = rag.session(), []
    session.ask(QUESTION, **SHORT)
    found = session.ask("And who is master there?", **SHORT).sources
    assert "clearport.md" in {hit.source for hit in found}

    def rewrite(messages):
        looked.append(messages)
        return QUESTION

    own = rag.session(system="Be brief.", rewrite=rewrite)
    own.ask(NEXT, **SHORT)
    assert not looked, "there is nothing to have in mind yet"
    answer = own.ask("zzz", **SHORT)
    assert [message["role"] for message in looked[0]] == ["system", "user", "assistant", "user"]
    assert looked[0][-1]["content"] == "zzz" and answer.sources == rag.ask(QUESTION, **SHORT).sources


def test_beyond_the_limit_the_oldest_turns_go(rag):
    one = rag.ask(QUESTION, **SHORT).report.fusion
    limit = one.prefix_tokens + one.chunk_tokens + one.suffix_tokens + 90
    session, answers, questions = rag.session(context_tokens=limit), [], [QUESTION, NEXT, THIRD, QUESTION, NEXT, THIRD]
    for question in questions:
        answers.append(session.ask(question, **SHORT))
        assert len(state(session).past.ids) <= limit
    now, whole = state(session), rag.session()
    assert now.dropped and now.turns and len(now.dropped) + len(now.turns) == len(questions)
    assert [message["content"] for message in session.messages[::2]] == questions
    for question in questions:
        whole.ask(question, **SHORT)
    assert len(state(whole).past.ids) > limit
    # put together anew, it is the prompt of the turns that are left
    rebuilt = [answer for answer in answers[1:] if answer.report.fusion.reused_tokens < 40]
    assert rebuilt
    said = session.messages[2 * len(now.dropped) : -1]
    chunks = list({chunk.ids: chunk for turn in now.turns for chunk in turn.chunks}.values())
    want = rag.engine.generate(chunks, said, max_new_tokens=4, eos_token_id=None)
    if answers[-1] in rebuilt:
        assert answers[-1].token_ids == want.token_ids
    with pytest.raises(PromptTooLongError, match="leave room for 3 more in context_tokens=20, and 4 were asked for"):
        rag.session(context_tokens=20).ask(QUESTION, **SHORT)
    said = f"leave room for 91 more in context_tokens={limit}, and 99 were asked for"
    with pytest.raises(PromptTooLongError, match=said):
        rag.session(context_tokens=limit).ask(QUESTION, **{**SHORT, "max_new_tokens": 99})
    with pytest.raises(PromptTooLongError, match="in the model's 2048 positions"):
        rag.session(context_tokens=9999).ask(QUESTION, **{**SHORT, "max_new_tokens": 3000})


def test_the_models_positions_are_a_limit_too():
    with spread(open_rag(model=tiny_model(vocab_size=1792, max_position_embeddings=256))) as rag:
        session = rag.session()
        for _ in range(3):
            for question in (QUESTION, NEXT, THIRD):
                answer = session.ask(question, **SHORT)
                assert len(answer.token_ids) == 4
        assert state(session).dropped and len(state(session).past.ids) <= 256
        before = state(session)
        with pytest.raises(PromptTooLongError):
            session.ask(QUESTION, **{**SHORT, "max_new_tokens": 300})
        assert state(session) is before


def test_rebuilt_is_the_prompt_of_messages(rag):
    """Turns that are left are written as messages, with their passages in front of the new question."""
    session = rag.session(system="Be brief.")
    session.ask(QUESTION, **SHORT)
    session.ask(NEXT, **SHORT)
    session._state = state(session).without(1)
    said = [{"role": "system", "content": "Be brief."}, *session.messages[3:], {"role": "user", "content": THIRD}]
    got = session.ask(THIRD, **SHORT)
    chunks = list({chunk.ids: chunk for turn in state(session).turns for chunk in turn.chunks}.values())
    want = rag.engine.generate(chunks, said, keep_past=True, max_new_tokens=4, eos_token_id=None)
    assert got.token_ids == want.token_ids and state(session).past.ids == want.past.ids


def test_a_turn_that_fails_leaves_the_session_as_it_was(rag):
    session, twin = rag.session(), rag.session()
    for one in (session, twin):
        one.ask(QUESTION, **SHORT)

    def broken(ids, scores):
        raise RuntimeError("out of memory")

    before, messages = state(session), session.messages
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            session.ask(NEXT, logits_processor=[broken], **SHORT)
    _, pieces = session.stream(NEXT, **LONG)
    next(pieces)
    with pytest.raises(ConversationError, match="one caller at a time"):
        session.ask(NEXT, **SHORT)
    pieces.close()
    _, pieces = session.stream(NEXT, **LONG)
    next(pieces)
    del pieces
    for wrong, error in (
        ({"num_beams": 2}, ArgumentError),
        ({"system": "x"}, UnknownArgumentError),
        ({"messages": []}, UnknownArgumentError),
    ):
        with pytest.raises(error):
            session.ask(NEXT, **wrong)
    for blank in ("", " ", None, ["a"]):
        with pytest.raises(RetrievalError):
            session.ask(blank)
    assert state(session) is before and session.messages == messages
    assert session.ask(NEXT, **SHORT).token_ids == twin.ask(NEXT, **SHORT).token_ids


def test_a_copy_goes_its_own_way(rag):
    session, twin = rag.session(), rag.session()
    for one in (session, twin):
        one.ask(QUESTION, **SHORT)
    other = copy.copy(session)
    for question in (NEXT, THIRD):
        assert other.ask(THIRD, **SHORT).text
        session.ask(question, **SHORT), twin.ask(question, **SHORT)
    assert session.messages == twin.messages
    assert [message["content"] for message in other.messages[2::2]] == [THIRD, THIRD]


def test_streams_are_turns(rag):
    session, twin = rag.session(), rag.session()
    for question in (QUESTION, NEXT):
        want = twin.ask(question, **SHORT)
        sources, pieces = session.stream(question, **SHORT)
        assert not session.messages or session.messages[-2]["content"] != question
        assert "".join(pieces) == want.text and sources == want.sources
        assert pieces.past is None, "it is the session's"
    assert session.messages == twin.messages
    assert state(session).past.ids == state(twin).past.ids


def test_in_an_event_loop(rag):
    twin = rag.session()
    want = [twin.ask(question, **SHORT) for question in (QUESTION, NEXT, THIRD)]

    async def talk():
        session = rag.session()
        first = await session.aask(QUESTION, **SHORT)
        stream = session.astream(NEXT, **SHORT)
        text = "".join([piece async for piece in stream])
        assert stream.sources == want[1].sources
        return [first.text, text, (await session.aask(THIRD, **SHORT)).text], session.messages

    texts, messages = asyncio.run(talk())
    assert texts == [answer.text for answer in want] and messages == twin.messages


@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize("how", ["aask", "aclose", "late aclose"])
def test_who_stops_listening_leaves_the_session_as_it_was(rag, how, turns):
    """And may ask again at once, though the model may not have stopped yet."""
    session, twin = rag.session(), rag.session()
    for _ in range(turns):
        session.ask(QUESTION, **SHORT), twin.ask(QUESTION, **SHORT)
    before, begun = state(session), threading.Event()

    async def stopped():
        watched = {**LONG, "stopping_criteria": [lambda *_, **__: begun.set() or False]}
        if how == "aask":
            asked = asyncio.ensure_future(session.aask(NEXT, **watched))
            while not begun.is_set():
                await asyncio.sleep(0.001)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        else:
            stream = session.astream(NEXT, **(SHORT if how == "late aclose" else watched))
            await anext(stream)
            while how == "late aclose" and len(stream.token_ids) < 4:  # the model is done, the listener is not
                await asyncio.sleep(0.001)
            await stream.aclose()
        assert state(session) is before
        return await session.aask(NEXT, **SHORT)

    assert asyncio.run(stopped()).token_ids == twin.ask(NEXT, **SHORT).token_ids
    assert session.messages == twin.messages


def test_two_callers_at_once_are_told(rag):
    session = rag.session()
    _, pieces = session.stream(QUESTION, **SHORT)
    next(pieces)
    session.ask(NEXT, **SHORT)  # in a cache of its own: nothing was said before
    before = session.messages
    with pytest.raises(ConversationError, match="answered in this session meanwhile"):
        list(pieces)
    assert session.messages == before


def test_another_model_begins_anew():
    with spread(open_rag(model=tiny_model(vocab_size=1792))) as rag:
        session = rag.session()
        session.ask(QUESTION, **SHORT)
        with torch.no_grad():
            rag.engine.model.get_input_embeddings().weight.mul_(1.1)
        seen = Seen()
        answer = session.ask(NEXT, method=FullPrefill(), logits_processor=[seen], **SHORT)
        assert answer.report.fusion.reused_tokens == 0 and len(session.messages) == 4
        for ids, scores in seen.steps:
            assert float((scores - full(rag.engine.model, ids)).abs().max()) < 1e-4
        assert session.ask(THIRD, **SHORT).report.fusion.reused_tokens > 0


def test_namespace_and_system_message(rag):
    for namespace, system in (("a", None), (None, "Be brief."), ("b", "Be brief.")):
        if namespace:
            rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS), namespace=namespace)
        for want in ("computed", "cpu") if system else ("cpu",):
            session = rag.session(namespace=namespace, system=system)
            answer = session.ask(QUESTION, **SHORT)
            assert set(answer.report.fusion.hits) == {want}
            assert answer.token_ids == rag.ask(QUESTION, namespace=namespace, system=system, **SHORT).token_ids
            if system:
                assert session.messages[0] == {"role": "system", "content": system}
    for wrong, error in (
        ({"namespace": 3}, ArgumentTypeError),
        ({"system": 3}, ArgumentTypeError),
        ({"rewrite": 3}, ArgumentTypeError),
        ({"context_tokens": "x"}, ArgumentTypeError),
        ({"context_tokens": 0}, ArgumentError),
    ):
        with pytest.raises(error, match=next(iter(wrong))):
            rag.session(**wrong)


@pytest.mark.parametrize("text", ["", " ", None, 3, "harbour " * 9999])
def test_a_rewrite_that_says_nothing_or_far_too_much_is_named(rag, monkeypatch, text):
    session = rag.session(rewrite=lambda messages: text)
    session.ask(QUESTION, **SHORT)
    monkeypatch.setattr(rag.retriever.embedder, "encode_query", lambda text: pytest.fail("it was looked for"))
    with pytest.raises(RetrievalError, match=r"rewrite (must give a text .* got|gave \d+ tokens to look for)"):
        session.ask(NEXT, **SHORT)
    assert len(session.messages) == 2


def test_whoever_goes_on_from_an_answer_stays_in_its_namespace_and_behind_its_system_message(rag, monkeypatch):
    for namespace, name in (("a", "of a"), ("", "own")):
        rag.add_texts(["The harbour master of Clearport is old."], [name], namespace=namespace)
    past = rag.ask(QUESTION, namespace="a", system="Be brief.", keep_past=True, **SHORT).past
    answer, (_, pieces) = rag.ask(NEXT, past=past, **SHORT), rag.stream(NEXT, past=past, **SHORT)
    assert "".join(pieces) == answer.text
    for one in (answer, pieces):
        assert [hit.source for hit in one.sources] == ["of a"]
        assert one.report.fusion.sources == ["cpu"], "it was read behind this system message"
    monkeypatch.setattr(rag.retriever.embedder, "encode_query", lambda text: pytest.fail("it was looked for"))
    for more in ({"namespace": "a"}, {"system": "Be brief."}):
        with pytest.raises(ArgumentError, match="the past has its system message, namespace"):
            rag.ask(NEXT, past=past, **more)


def test_namespaces_of_a_folder(model, tmp_path):
    """Documents of each are found and read in it alone."""
    with open_rag(tmp_path, model=model) as rag:
        texts, names = list(DOCUMENTS.values())[:2], list(DOCUMENTS)[:2]
        read = rag.add_texts(texts, names, namespace="a").tokens_read
        assert read and rag.add_texts(texts, names, namespace="a").tokens_read == 0
        answer = rag.ask(QUESTION, namespace="a", **SHORT)
        assert set(answer.report.fusion.hits) <= {"cpu", "disk"}
        for others in ({}, {"namespace": "b"}):
            with pytest.raises(RagKVError, match=r"no documents .*yet"):
                rag.ask(QUESTION, **others)
            with pytest.raises(RagKVError, match=r"no documents .*yet"):
                rag.session(**others).ask(QUESTION)
        assert rag.add_texts(texts[:1], names[:1]).tokens_read > 0
        assert {hit.source for hit in rag.ask(QUESTION, **SHORT).sources} == {names[0]}
    with open_rag(tmp_path, model=model) as rag:
        assert set(rag.ask(QUESTION, namespace="a", **SHORT).report.fusion.hits) == {"disk"}
        assert rag.session(namespace="a").ask(QUESTION, **SHORT).token_ids == answer.token_ids
        assert [document.source for document in rag.documents(namespace="a")] == sorted(names)
        rag.remove(names[0], namespace="a")
        assert [document.source for document in rag.documents(namespace="a")] == names[1:]
        assert [document.source for document in rag.documents()] == names[:1]


def test_messages_of_a_rag(rag):
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Clearport."}]
    talk.append({"role": "user", "content": "And who is master there?"})
    answer = rag.ask(messages=talk, **SHORT)
    assert "clearport.md" in {hit.source for hit in answer.sources}
    hits = rag.retrieve("\n".join(message["content"] for message in talk), 2)
    want = rag.engine.generate(rag.chunks(hits), talk, max_new_tokens=4, eos_token_id=None)
    assert answer.token_ids == want.token_ids == rag.ask(messages=iter(talk), **SHORT).token_ids
    sources, pieces = rag.stream(messages=talk, **SHORT)
    assert ("".join(pieces), sources) == (answer.text, answer.sources)

    async def both():
        stream = rag.astream(messages=talk, **SHORT)
        return (await rag.aask(messages=talk, **SHORT)).token_ids, [piece async for piece in stream], stream

    ids, parts, stream = asyncio.run(both())
    assert ids == stream.token_ids == answer.token_ids and "".join(parts) == answer.text
    for question, messages in ((None, None), (QUESTION, talk)):
        with pytest.raises(ArgumentError, match=r"a question or messages=\[...\], one of the two"):
            rag.ask(question, messages=messages)


def test_a_system_message_with_an_anchor_reads_no_document_again(model, reads):
    template = PromptTemplate(
        prefix="Read.\n", after_chunk="\n", before_question="Q:", after_question="\nA:", anchor="<bos>"
    )
    with spread(open_rag(model=model, template=template, method=Reuse())) as rag:
        stored, texts = len(rag.engine.store), set()
        for system in (None, "Be brief.", "Answer at length.", "Talk in riddles."):
            answer = rag.ask(QUESTION, system=system, **SHORT)
            session = rag.session(system=system)
            for report in (answer.report, *(session.ask(question, **SHORT).report for question in (QUESTION, NEXT))):
                assert set(report.fusion.hits) <= {"cpu"}
            texts.add(tuple(answer.token_ids))
        assert len(rag.engine.store) == stored and len(texts) > 1
