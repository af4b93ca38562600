"""A folder cut for a model of many positions, opened with one of few: what is too long for it is left out and named."""

import asyncio
import logging

import pytest

from ragkv import PromptTooLongError
from ragkv.retrieval import TokenChunker
from ragkv.testing import tiny_model

from .rags import DOCUMENTS, TOKENIZER, open_rag, small_model

TEXTS = list(DOCUMENTS.values())
LONG = " ".join(TEXTS[:3])
SHORT = "The harbour lies in the north and is small."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One document of passages of 230, 194 and 82 tokens, and one short one."""
    place = tmp_path_factory.mktemp("long")
    with open_rag(place, small_model()) as rag:
        rag.chunker = TokenChunker(TOKENIZER, 250)
        rag.add_texts([LONG, SHORT], ["long", "short"])
    return place


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=1792, max_position_embeddings=160)


def test_they_are_left_out_and_named(folder, model, caplog):
    with open_rag(folder, model) as rag:
        found = rag.retrieve("harbour", 20)
        long = [hit for hit, chunk in zip(found, rag.chunks(found), strict=True) if len(chunk) > 160]
        few = [hit for hit in found if hit not in long]
        assert len(long) == 2 and {hit.source for hit in few} == {"long", "short"}, "parts of one document are left out"
        top_k = len(found)
        with caplog.at_level(logging.WARNING):
            answer = rag.ask("harbour", top_k=top_k, max_new_tokens=2)
        assert [(hit.source, hit.position) for hit in answer.left_out] == [(hit.source, hit.position) for hit in long]
        assert [(hit.source, hit.position) for hit in answer.sources] == [(hit.source, hit.position) for hit in few]
        assert len(answer.report.fusion.sources) == len(few)
        (warning,) = [record.getMessage() for record in caplog.records if record.name == "ragkv.finding"]
        for hit in long:
            assert f"passage {hit.position + 1} of long (" in warning
        want = rag.engine.generate(rag.chunks(few), "harbour", max_new_tokens=2)
        assert answer.token_ids == want.token_ids
        hits, pieces = rag.stream("harbour", top_k=top_k, max_new_tokens=2)
        assert len(hits) == len(few) and "".join(pieces) == answer.text
        assert (pieces.sources, pieces.left_out) == (hits, answer.left_out)

        async def streamed():
            pieces = rag.astream("harbour", top_k=top_k, max_new_tokens=2)
            assert (pieces.sources, pieces.left_out) == ([], [])
            return "".join([piece async for piece in pieces]), pieces.sources, pieces.left_out

        assert asyncio.run(streamed()) == (answer.text, answer.sources, answer.left_out)


def test_nothing_is_left(folder, model):
    with open_rag(folder, model) as rag:
        longest = max(rag.retriever.catalogue.texts("long"), key=len)
        with pytest.raises(
            PromptTooLongError, match=r"all passages found are longer than the \d+ .* passage \d+ of long \("
        ):
            rag.ask(longest[:300], top_k=1)


def test_the_folder_can_be_used_otherwise(folder, model):
    with open_rag(folder, model) as rag:
        rag.refresh()
        assert rag.refresh() == 0
        assert 0 < rag.pin("long") < len(rag.retriever.catalogue.texts("long"))
        rag.chunker = TokenChunker(TOKENIZER, 250)
        assert rag.add_texts([LONG], ["long"]).tokens_read == 0, "it is not cut again, and what fits is read already"
        with pytest.raises(PromptTooLongError, match="split it into smaller parts"):
            rag.add_texts([LONG + " More."], ["new"])
    with open_rag(folder, small_model()) as rag:
        assert rag.refresh() == 0 and not rag.ask("harbour", max_new_tokens=1).left_out


def test_a_question_that_is_too_long_is_refused_before_it_is_looked_for(rag, monkeypatch):
    question = "word " * rag.engine.decoder.max_positions
    monkeypatch.setattr(rag.retriever.embedder, "encode_query", lambda text: pytest.fail("it was looked for"))
    for asked in (
        lambda: rag.ask(question),
        lambda: rag.ask(messages=[{"role": "user", "content": question}]),
        lambda: rag.stream(question),
        lambda: rag.session().ask(question),
    ):
        with pytest.raises(PromptTooLongError, match="or a shorter question"):
            asked()


def test_so_is_one_behind_a_past_and_one_too_long_for_its_session(rag, monkeypatch):
    past = rag.ask("harbour", top_k=1, max_new_tokens=1, keep_past=True).past
    session, question = rag.session(context_tokens=60), "harbour " * 50
    monkeypatch.setattr(rag.retriever.embedder, "encode_query", lambda text: pytest.fail("it was looked for"))
    with pytest.raises(PromptTooLongError, match=r"more than context_tokens=60: give"):
        session.ask(question)
    with pytest.raises(PromptTooLongError, match=r"more than the model's 160 positions: give"):
        rag.ask("word " * rag.engine.decoder.max_positions, past=past)
