"""The chat model: what it places, what it says it cost, what it refuses."""

import asyncio

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from ragkv import ArgumentTypeError, Engine, PromptError, UnknownArgumentError
from ragkv.adapters.langchain import ChatRagKV, RagKVRetriever, RagKVVectorStore
from ragkv.adapters.langchain.chat import _ROLES
from ragkv.bundled import MODEL_PATH
from tests.rag.rags import QUESTION, TEMPLATE, TOKENIZER, open_rag


def joined(documents):
    return "\n\n".join(document.page_content for document in documents)


def message_for(rag, **options):
    return f"{joined(RagKVRetriever(rag=rag, **options).invoke(QUESTION))}\n\n{QUESTION}"


def usage(message):
    given = message.usage_metadata
    return given["input_token_details"]["cache_read"], given["input_token_details"]["cache_creation"]


def test_found_passages_are_placed_and_not_read(rag, reads):
    want = rag.ask(QUESTION, top_k=4, max_new_tokens=6)
    message, seen = message_for(rag, k=4), reads(rag.engine)
    answer = ChatRagKV(rag=rag, max_tokens=6).invoke(message)
    fusion = want.report.fusion
    assert answer.text == want.text and not seen and usage(answer) == (fusion.chunk_tokens, 0)
    given = fusion.prefix_tokens + fusion.chunk_tokens + fusion.suffix_tokens
    assert [answer.usage_metadata[f"{name}_tokens"] for name in ("input", "output", "total")] == [given, 6, given + 6]


def test_lost_kv_are_read_and_counted(rag):
    message, chat = message_for(rag, k=2), ChatRagKV(rag=rag, max_tokens=1)
    chunks = rag.chunks(rag.retrieve(QUESTION, 2))
    rag.engine.store.remove_many(list(rag.engine.documents.keys(chunks)))
    tokens = sum(map(len, chunks))
    assert usage(chat.invoke(message)) == (0, tokens) and usage(chat.invoke(message)) == (tokens, 0)


def test_what_is_not_placed_is_not_read_from_a_cache(rag):
    """The method computes everything anew, though all of it is stored; one of the passages is not even that."""
    message = message_for(rag, k=2)
    one, *_ = rag.engine.documents.keys(rag.chunks(rag.retrieve(QUESTION, 2)))
    rag.engine.store.remove(one)
    chat = ChatRagKV(rag=rag, max_tokens=1, generation={"method": "full-prefill"})
    assert usage(chat.invoke(message)) == (0, 0) and usage(list(chat.stream(message))[-1]) == (0, 0)
    assert usage(ChatRagKV(rag=rag, max_tokens=1).invoke(message))[0] > 0


def test_what_nobody_found_is_text(rag):
    chat = ChatRagKV(rag=rag.engine, max_tokens=4)
    answer = chat.invoke(f"Some text.\n\n{QUESTION}")
    assert usage(answer) == (0, 0)
    assert answer.text == rag.engine.generate([], f"Some text.\n\n{QUESTION}", max_new_tokens=4).text


def test_a_document_that_has_changed_since_is_text(rag):
    message, source = message_for(rag, k=1), rag.retrieve(QUESTION, 1)[0].source
    stored = len(rag.engine.store)
    rag.remove(source)
    gone = stored - len(rag.engine.store)
    assert usage(ChatRagKV(rag=rag, max_tokens=1).invoke(message)) == (0, 0)
    assert gone and len(rag.engine.store) == stored - gone, "what was removed stays removed"


def test_in_a_chain_of_langchains_own(rag, reads):
    store = RagKVVectorStore(rag)
    store.add_texts(["Clearport lies on the river Exe.", "The mill stands in Clearport."])
    seen, counted = reads(rag.engine), UsageMetadataCallbackHandler()
    retriever = store.as_retriever(search_kwargs={"k": 2})
    prompt = ChatPromptTemplate.from_template("{context}\n\n{question}")
    inputs = {"context": retriever | joined, "question": RunnablePassthrough()}
    chain = inputs | prompt | ChatRagKV(rag=rag, model="mine", max_tokens=4) | StrOutputParser()
    text = chain.invoke(QUESTION, {"callbacks": [counted]})
    assert text == rag.engine.generate(rag.chunks(rag.retriever.search(QUESTION, 2)), QUESTION, max_new_tokens=4).text
    assert not seen and counted.usage_metadata["mine"]["input_token_details"]["cache_read"] > 0
    assert "".join(chain.stream(QUESTION)) == text


async def test_in_an_event_loop(rag):
    message, chat = message_for(rag, k=3), ChatRagKV(rag=rag, max_tokens=6)
    want = chat.invoke(message)
    got = await chat.ainvoke(message)
    parts = [part async for part in chat.astream(message)]
    assert (got.text, got.usage_metadata) == (want.text, want.usage_metadata)
    assert "".join(part.text for part in parts) == want.text and len(parts) > 3
    assert parts[-1].usage_metadata == want.usage_metadata


async def test_a_copy_over_another_rag(rag, model):
    with open_rag(model=model) as closed:
        copy = ChatRagKV(rag=closed, max_tokens=2).model_copy(update={"rag": rag})
    assert (await copy.ainvoke(QUESTION)).text == copy.invoke(QUESTION).text


@pytest.mark.parametrize("how", ["ainvoke", "astream"])
async def test_a_task_that_is_cancelled_stops_the_model(rag, how):
    steps, begun = [], asyncio.Event()
    loop = asyncio.get_running_loop()

    def step(ids, scores, **_):
        steps.append(1)
        loop.call_soon_threadsafe(begun.set)
        return ids.new_zeros(len(ids)).bool()

    endless = {"max_new_tokens": 400, "min_new_tokens": 400, "stopping_criteria": [step]}
    chat = ChatRagKV(rag=rag, generation=endless)

    async def ask():
        if how == "ainvoke":
            await chat.ainvoke(QUESTION)
        async for _ in chat.astream(QUESTION):
            pass

    task = asyncio.ensure_future(ask())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    rag.threads.close()  # waits for what is worked on
    assert 0 < len(steps) < 400


def test_a_stream_that_is_closed_stops_the_model(rag):
    stream = ChatRagKV(rag=rag, generation={"max_new_tokens": 400, "min_new_tokens": 400}).stream(QUESTION)
    next(stream)
    stream.close()
    assert ChatRagKV(rag=rag, max_tokens=1).invoke(QUESTION)  # the model is free


def test_settings_reach_the_engine(rag):
    def options(call=None, stop=None, **fields):
        return ChatRagKV(rag=rag, **fields)._options(stop, call or {})

    assert options() == {}
    assert options(temperature=0, max_tokens=3) == {"do_sample": False, "max_new_tokens": 3}
    assert options(temperature=0.5, timeout=9) == {"do_sample": True, "temperature": 0.5, "max_time": 9}
    assert options(stop="a") == {"stop": "a"} and options(stop="a", call={}) == {"stop": "a"}
    assert ChatRagKV(rag=rag, stop=["a"])._options(["b"], {}) == {"stop": ["b"]}
    assert options({"max_tokens": 2, "top_k": 5}, max_tokens=3, generation={"top_k": 4, "top_p": 0.9}) == {
        "max_new_tokens": 2,
        "top_k": 5,
        "top_p": 0.9,
    }


def test_langchains_cache_tells_methods_apart(rag, model):
    cache, full = InMemoryCache(), Engine(model, TOKENIZER, template=TEMPLATE, method="full-prefill")
    for _ in range(2):
        for answers in (rag, full):
            ChatRagKV(rag=answers, max_tokens=2, cache=cache).invoke(QUESTION)
    assert len(cache._cache) == 2


def test_a_call_comes_first_whichever_name_it_says(rag):
    model = ChatRagKV(rag=rag, max_tokens=12, timeout=60, temperature=0.5, generation={"min_new_tokens": 2})
    own = {"max_new_tokens": 12, "max_time": 60, "do_sample": True, "temperature": 0.5, "min_new_tokens": 2}
    for call, want in (
        ({"max_new_tokens": 2}, {"max_new_tokens": 2}),
        ({"max_time": 1}, {"max_time": 1}),
        ({"do_sample": False}, {"do_sample": False}),
        ({"max_tokens": None, "temperature": None}, {}),
    ):
        assert model._options(None, call) == {**own, **want}
    assert "temperature" not in model._options(None, {"temperature": 0})
    assert ChatRagKV(rag=rag, temperature=0)._options(None, {"do_sample": True}) == {"do_sample": True}
    assert model.invoke(QUESTION, max_new_tokens=2).usage_metadata["output_tokens"] == 2


def test_it_ends_where_it_is_told(rag):
    text = ChatRagKV(rag=rag, max_tokens=8, temperature=0).invoke(QUESTION).text
    end = text.split()[2]
    cut = ChatRagKV(rag=rag, max_tokens=8, temperature=0, stop=[end]).invoke(QUESTION).text
    assert cut == text[: text.index(end)]
    assert ChatRagKV(rag=rag, max_tokens=8, temperature=0).invoke(QUESTION, stop=[end]).text == cut
    assert "".join(p.text for p in ChatRagKV(rag=rag, max_tokens=8, temperature=0).stream(QUESTION, stop=[end])) == cut


def test_timeout(rag):
    slow = ChatRagKV(rag=rag, timeout=1e-6, generation={"max_new_tokens": 400, "min_new_tokens": 400})
    assert slow.invoke(QUESTION).usage_metadata["output_tokens"] < 400


def test_tokens_are_counted_by_the_models_own_tokenizer(rag):
    assert ChatRagKV(rag=rag).get_token_ids(QUESTION) == list(rag.engine.encoder.ids(QUESTION))


def test_what_is_no_text_is_refused(rag):
    chat = ChatRagKV(rag=rag, max_tokens=1)
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    call = {"name": "f", "args": {}, "id": "1"}
    for message, said in (
        (HumanMessage([{"type": "text", "text": "hello"}, image]), r"must be text, got \['image_url'\]"),
        (HumanMessage([{"picture": "x"}]), "must be text, got"),
        (ToolMessage("done", tool_call_id="1"), "got a ToolMessage"),
        (AIMessage("", tool_calls=[call]), "knows no tools"),
    ):
        with pytest.raises(ArgumentTypeError, match=said):
            chat.invoke([message])
    with pytest.raises(PromptError, match="empty"):
        chat.invoke("")
    with pytest.raises(UnknownArgumentError, match="nonsense"):
        chat.invoke("hello", nonsense=1)
    with pytest.raises(ValidationError, match="rag"):
        ChatRagKV(rag="folder")
    with pytest.raises(ValidationError, match="max_token\n"):
        ChatRagKV(rag=rag, max_token=5)
    parts = ["he", {"type": "text", "text": "l"}, {"text": "lo"}]
    assert chat.invoke([HumanMessage(parts)]).text == chat.invoke("hello").text


def test_a_conversation(rag):
    """Passages belong to the last question; what was said before stands in front of them."""
    found = joined(RagKVRetriever(rag=rag, k=2).invoke(QUESTION))
    chunks = rag.chunks(rag.retrieve(QUESTION, 2))
    said = [HumanMessage("Hello."), AIMessage("Good day."), HumanMessage("Now then.")]
    answer = ChatRagKV(rag=rag, max_tokens=4).invoke([*said, HumanMessage(f"{found}\n\n{QUESTION}")])
    assert usage(answer) == (sum(map(len, chunks)), 0)
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": f"Now then.\n\n{QUESTION}"},
    ]
    assert answer.text == rag.engine.generate(chunks, messages, max_new_tokens=4).text


def test_a_system_message(rag):
    """Passages are read behind it once, where the template has no anchor."""
    messages = [SystemMessage("Be"), SystemMessage("brief."), HumanMessage(message_for(rag, k=2))]
    chat, tokens = ChatRagKV(rag=rag, max_tokens=4), sum(map(len, rag.chunks(rag.retrieve(QUESTION, 2))))
    want = rag.ask(QUESTION, top_k=2, system="Be\n\nbrief.", max_new_tokens=4).text
    answers = [chat.invoke(messages) for _ in range(2)]
    assert [answer.text for answer in answers] == [want, want] and usage(answers[1]) == (tokens, 0)


def test_passages_of_earlier_turns_are_text(rag):
    message, chat = message_for(rag, k=2), ChatRagKV(rag=rag, max_tokens=2)
    assert usage(chat.invoke([HumanMessage(message), AIMessage("The Exe."), HumanMessage("Why?")])) == (0, 0)


def test_roles_that_nobody_knows_are_refused(rag):
    chat = ChatRagKV(rag=rag, max_tokens=1)
    for messages, said in (
        ([ChatMessage("hello", role="critic")], "a role must be one of system, user, assistant, got 'critic'"),
        ([HumanMessage("hello"), AIMessage("good day")], "the last message must be the user's question"),
        ([HumanMessage("hello"), SystemMessage("Be brief."), HumanMessage("and?")], "there may be one system message"),
    ):
        with pytest.raises(PromptError, match=said):
            chat.invoke(messages)


def test_roles_come_from_the_chat_template(model):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    engine = Engine(model, tokenizer, method="reuse")
    said = [SystemMessage("Be brief."), HumanMessage("Hello."), AIMessage("Good day."), HumanMessage(QUESTION)]
    messages = [{"role": _ROLES[type(message)], "content": message.content} for message in said]
    want = engine.generate([], messages, max_new_tokens=4)
    assert ChatRagKV(rag=engine, max_tokens=4).invoke(said).text == want.text
    prompt = tokenizer.decode(engine.fuse([], messages).input_ids[0])
    assert "[system] Be brief. [user] Hello. [assistant] Good day. [user]" in " ".join(prompt.split())
