"""Options of retrieval, through every way of asking."""

import asyncio
import time

import pytest

from ragkv.errors import (
    ArgumentError,
    DeadlineError,
    DocumentError,
    MethodError,
    RagKVError,
    RetrievalError,
    UnknownArgumentError,
)
from ragkv.retrieval import Document

from .rags import DOCUMENTS, QUESTION, open_rag


@pytest.fixture
def listed(model):
    with open_rag(model=model) as rag:
        metadata = [{"number": number} for number in range(len(DOCUMENTS))]
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS), metadata)
        yield rag


def test_every_way_of_asking_takes_them(listed):
    options = {"top_k": 3, "neighbours": 1, "hybrid": True, "hops": 2, "where": {"number": {"$lt": 4}}}
    found = listed.retrieve(QUESTION, **options)
    assert found != listed.retrieve(QUESTION, 3) and {hit.metadata["number"] for hit in found} <= {0, 1, 2, 3}
    asked = {**options, "max_new_tokens": 2}

    async def piecewise():
        pieces = listed.astream(QUESTION, **asked)
        async for _ in pieces:
            pass
        return pieces.sources

    ways = {
        "ask": listed.ask(QUESTION, **asked).sources,
        "stream": listed.stream(QUESTION, **asked)[0],
        "aask": asyncio.run(listed.aask(QUESTION, **asked)).sources,
        "astream": asyncio.run(piecewise()),
    }
    for way, sources in ways.items():
        assert sources == found, way


def test_orders_are_those_of_the_prompt(listed):
    ranked = [hit.passage_id for hit in listed.retriever.search(QUESTION, 5)]
    orders = {order: listed.retrieve(QUESTION, 5, order=order) for order in ("document", "retrieved", "best-last")}
    assert listed.retrieve(QUESTION, 5) == orders["document"]
    assert [hit.passage_id for hit in orders["retrieved"]] == ranked
    assert [hit.passage_id for hit in orders["best-last"]] == ranked[::-1]
    assert [hit.passage_id for hit in orders["document"]] not in (ranked, ranked[::-1])
    session = listed.session()
    for order, hits in orders.items():
        answer = listed.ask(QUESTION, order=order, max_new_tokens=1)
        assert answer.sources == hits
        assert [(chunk.name, chunk.number) for chunk in answer.report.fusion.chunks] == [
            (hit.source, hit.position) for hit in hits
        ]
    assert session.ask(QUESTION, order="best-last", max_new_tokens=1).sources == orders["best-last"]


def test_a_text_stands_once_in_a_prompt(listed):
    text = DOCUMENTS["clearport.md"]
    listed.add_texts([text], ["copy.md"])
    before = listed.retriever.search(QUESTION, 6)
    assert len({hit.text for hit in before}) < len(before), "who searches sees both"
    answer = listed.ask(QUESTION, top_k=6, max_new_tokens=1)
    assert answer.sources == listed.retrieve(QUESTION, 6) and len(answer.sources) == 6
    assert len({hit.text for hit in answer.sources}) == 6
    chunks = answer.report.fusion.chunks
    assert [(chunk.name, chunk.number) for chunk in chunks] == [(hit.source, hit.position) for hit in answer.sources]
    copies = {hit.source: {copy.source for copy in hit.copies} for hit in answer.sources if hit.copies}
    assert copies in ({"clearport.md": {"copy.md"}}, {"copy.md": {"clearport.md"}})
    for hit in answer.sources:
        assert all((copy.text, copy.position) == (hit.text, hit.position) for copy in hit.copies)


def test_a_text_stands_once_in_a_conversation(listed):
    listed.add_texts([DOCUMENTS["clearport.md"]], ["copy.md"])
    session, options = listed.session(), {"top_k": 2, "max_new_tokens": 1}
    first = session.ask(QUESTION, where={"source": "clearport.md"}, **options)
    again = session.ask(QUESTION, where={"source": "copy.md"}, **options)
    assert {hit.text for hit in first.sources} == {hit.text for hit in again.sources}
    assert {hit.source for hit in again.sources} == {"copy.md"} and again.report.fusion.sources == ["prompt"] * 2


def test_a_budget_of_tokens(listed):
    everything = listed.retrieve(QUESTION, 50)
    lengths = {hit.passage_id: len(chunk) for hit, chunk in zip(everything, listed.chunks(everything), strict=True)}
    ranked = [hit.passage_id for hit in listed.retriever.search(QUESTION, 50)]
    for budget in (max(lengths.values()), 150, 400, 10_000):
        found = [hit.passage_id for hit in listed.retrieve(QUESTION, max_context_tokens=budget)]
        assert sum(lengths[each] for each in found) <= budget
        taken, left = set(), budget
        for each in ranked:
            if lengths[each] <= left:
                taken.add(each)
                left -= lengths[each]
        assert set(found) == taken, budget
        report = listed.ask(QUESTION, max_context_tokens=budget, max_new_tokens=1).report
        assert report.fusion.chunk_tokens <= budget
    assert len(listed.retrieve(QUESTION, max_context_tokens=10_000)) == len(ranked), "more than five"
    assert listed.retrieve(QUESTION, max_context_tokens=10**30) == listed.retrieve(QUESTION, max_context_tokens=10_000)
    assert len(listed.retrieve(QUESTION, 2, max_context_tokens=10_000)) == 2, "both hold"
    some = listed.retrieve(QUESTION, 1, neighbours=9, max_context_tokens=100)
    assert ranked[0] in {hit.passage_id for hit in some} and sum(lengths[hit.passage_id] for hit in some) <= 100


def test_a_budget_over_documents_that_another_model_read(listed, tmp_path, model):
    with open_rag(tmp_path, model=model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
    with open_rag(tmp_path, model=model, context="chunk") as other:
        found = other.retrieve(QUESTION, max_context_tokens=200, hybrid=True)
        assert found and sum(map(len, other.chunks(found))) <= 200


def test_nothing_found_is_said(listed):
    for options in ({"where": {"number": 99}}, {"min_score": 9.0}, {"max_context_tokens": 1}):
        assert listed.retrieve(QUESTION, **options) == []
        for ask in (listed.ask, listed.stream):
            with pytest.raises(RetrievalError, match=f"no passage was found with {next(iter(options))}=[^ ]") as error:
                ask(QUESTION, **options)
            assert str(error.value).count("=") == 1, "what does not narrow the search is not named"


def test_a_deadline_counts_from_the_call(listed):
    def slow(question, texts):
        time.sleep(0.05)
        return [0.0] * len(texts)

    options = {"rerank": slow, "deadline_s": 0.01, "max_new_tokens": 1}
    for ask in (listed.ask, lambda *given, **more: list(listed.stream(*given, **more)[1]), listed.session().ask):
        with pytest.raises(DeadlineError, match="had not come at its deadline"):
            ask(QUESTION, **options)


def test_arguments_are_looked_at_before_anything_is_searched(listed):
    searched = []
    options = {"rerank": lambda question, texts: searched.append(1) or [0.0] * len(texts)}
    for ask in (listed.ask, listed.stream, listed.session().ask):
        for wrong in ({"max_new_token": 1}, {"num_beams": "x"}, {"deadline_s": 0}, {"method": "none"}):
            with pytest.raises((ArgumentError, MethodError, TypeError)):
                ask(QUESTION, **options, **wrong)
    assert not searched


def test_unknown_options_are_refused_by_name(listed):
    with pytest.raises(UnknownArgumentError, match="no option max_new_tokens"):
        listed.retrieve(QUESTION, max_new_tokens=3)
    with pytest.raises((ArgumentError, UnknownArgumentError), match="topk"):
        listed.ask(QUESTION, topk=3)


def test_a_function_is_a_condition(listed):
    seen = []

    def fits(document):
        seen.append(document)
        return document.source == "clearport.md"

    assert {hit.source for hit in listed.retrieve(QUESTION, 9, where=fits)} == {"clearport.md"}
    assert len(seen) == len(DOCUMENTS) and all(isinstance(document, Document) for document in seen)


def test_users_of_one_folder_are_kept_apart(model, tmp_path):
    with (
        open_rag(tmp_path, model=model, namespace="ada") as ada,
        open_rag(tmp_path, model=model, namespace="bob") as bob,
        open_rag(tmp_path, model=model) as nobody,
    ):
        ada.add_texts(["Ada's boat lies in Clearport.", "The same text."], ["notes", "same"])
        bob.add_texts(["Bob's goose lives in Belmar.", "The same text."], ["notes", "same"])
        assert {hit.text for hit in ada.ask("Where?", top_k=9, max_new_tokens=1).sources} == {
            "Ada's boat lies in Clearport.",
            "The same text.",
        }
        assert {hit.text for hit in bob.retrieve("Where?", 9, hybrid=True)} == {
            "Bob's goose lives in Belmar.",
            "The same text.",
        }
        with pytest.raises(RagKVError, match="there are no documents yet"):
            nobody.ask("Where?")
        with (
            open_rag(tmp_path, model=model, namespace="eve") as eve,
            pytest.raises(RagKVError, match="no documents in namespace 'eve' yet"),
        ):
            eve.ask("Where?")
        assert [(each.source, each.namespace) for each in ada.documents()] == [("notes", "ada"), ("same", "ada")]
        assert not set(ada._keys("same")) & set(bob._keys("same"))
        with pytest.raises(DocumentError):
            nobody.remove("notes")
        ada.remove("notes")
        assert [each.source for each in bob.documents()] == ["notes", "same"]
        assert bob.ask("Where?", max_new_tokens=1).report.fusion.sources.count("miss") == 0
        assert bob.refresh() == 0 and ada.refresh() == 0


def test_a_moved_file_is_its_owners(model, tmp_path):
    file = tmp_path / "files" / "notes.md"
    file.parent.mkdir()
    file.write_text("Ada's boat lies in Clearport.")
    with (
        open_rag(tmp_path / "kv", model=model, namespace="ada") as ada,
        open_rag(tmp_path / "kv", model=model, namespace="bob") as bob,
    ):
        ada.add_files(file)
        bob.add_files(file)
        file.rename(file.with_name("moved.md"))
        assert ada.sync(file.parent).moved == {str(file.with_name("moved.md")): str(file)}
        assert [each.source for each in bob.documents()] == [str(file)]
        assert bob.retrieve("Where?")[0].source == str(file)
        file.with_name("moved.md").write_text("Another text.")
        assert bob.sync(file.parent).removed == [str(file)]
        assert [hit.text for hit in ada.retrieve("Where?")] == ["Ada's boat lies in Clearport."]
