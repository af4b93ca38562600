"""A slot called ranks: which of the passages are the best, whatever order they stand in."""

from dataclasses import replace

import pytest

from ragkv import FullPrefill

from .rags import DOCUMENTS, QUESTION, TEMPLATE, TOKENIZER, open_rag

RANKED = replace(TEMPLATE, before_question="\nBest: {ranks} end.\nQuestion:", slots={"ranks": "unknown"})
OPTIONS = {"max_new_tokens": 2, "do_sample": False}


@pytest.fixture(scope="module")
def ranked(model):
    with open_rag(model=model, template=RANKED, context="chunk", paths=16 << 20, method=FullPrefill()) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        yield rag


def named(ids):
    """The places that stand in each such slot of a prompt."""
    text = TOKENIZER.decode(ids).replace(" ", "")
    found = [part.split("end.")[0] for part in text.split("Best:")[1:]]
    return [[int(place) for place in part.split(",")] if part != "unknown" else part for part in found]


@pytest.mark.parametrize("order", ["document", "retrieved", "best-last", "cache"])
def test_a_prompt_names_the_best_passages_by_their_places(ranked, order):
    options = {"top_k": 3, "neighbours": 1}
    best = [hit.passage_id for hit in ranked.retrieve(QUESTION, order="retrieved", **options)]
    if order == "cache":  # another order was computed before
        hits = ranked.retrieve(QUESTION, **options)
        ranked.engine.fuse(ranked.chunks([hits[2], hits[0]]), QUESTION)
        ranked.engine.paths.wait()
    answer = ranked.ask(QUESTION, order=order, keep_past=True, **options, **OPTIONS)
    places = [hit.passage_id for hit in answer.sources]
    (got,) = named(answer.past.ids)
    assert [places[place - 1] for place in got] == best
    assert [hit.rank for hit in answer.sources] == [best.index(each) + 1 for each in places]
    assert got == {"retrieved": [*range(1, len(best) + 1)], "best-last": [*range(len(best), 0, -1)]}.get(order, got)
    _, pieces = ranked.stream(QUESTION, order=order, **options, **OPTIONS)
    assert "".join(pieces) == answer.text


def test_what_a_call_says_stands_there_instead(ranked):
    answer = ranked.ask(QUESTION, slots={"ranks": "7, 8"}, keep_past=True, **OPTIONS)
    assert named(answer.past.ids) == [[7, 8]]
    chunks = ranked.chunks(ranked.retrieve(QUESTION))
    assert named(ranked.engine.fuse(chunks, QUESTION).input_ids[0]) == ["unknown"]


def test_a_session_names_those_that_were_placed_for_the_question(ranked):
    session = ranked.session()
    first = session.ask(QUESTION, top_k=3, order="best-last", **OPTIONS)
    assert named(session._state.past.ids) == [[3, 2, 1]]
    again = session.ask(QUESTION, top_k=5, order="best-last", **OPTIONS)
    new = [hit.passage_id for hit in again.sources if hit.passage_id not in {hit.passage_id for hit in first.sources}]
    assert new and named(session._state.past.ids)[1] == [*range(len(new), 0, -1)]


def test_a_prompt_that_was_begun_ahead_names_them_too(ranked):
    def rerank(question, texts):
        assert ranked._asking._ahead.background.wait(30)
        return [-number for number in range(len(texts))]

    ranked.retriever._second_s = 1.0
    answer = ranked.ask(QUESTION, rerank=rerank, order="best-last", top_k=3, keep_past=True, **OPTIONS)
    ranked.retriever._second_s = 0.0
    assert answer.report.fusion.speculated == "used" and named(answer.past.ids) == [[3, 2, 1]]
