"""What tests of the vector store share: texts, with where they stand."""

from langchain_core.documents import Document

from ragkv.adapters.langchain.documents import passages_of
from ragkv.adapters.passages import hand_over

TEXTS = ["Clearport lies on the river Exe.", "Mira Lund runs the mill.", "The mill stands in Clearport."]
WHERE = [{"page": 1, "kind": "town"}, {"page": 2, "kind": "mill"}, {"page": 3, "kind": "mill", "tags": ["old"]}]
PARTS = ["Clearport lies on the river Exe.", "It sells tar by the barrel.", "She runs the harbour there."]


def parts(source="port.md", numbers=(0, 1, 2), **more):
    return [
        Document(id=f"{source} {n}", page_content=PARTS[n], metadata={"source": source, "start_index": 100 * n, **more})
        for n in numbers
    ]


def ids(documents):
    return [document.id for document in documents]


def contexts(store, documents):
    """What answers with these documents takes: ids and contexts of stored chunks."""
    engine = store.rag.engine
    chunks = hand_over(engine, passages_of(documents, engine, "")).chunks
    assert not engine.documents.missing(chunks)
    return [(chunk.ids, chunk.context) for chunk in chunks]
