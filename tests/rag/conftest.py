import pytest

from ragkv import RAG, Engine, Reuse, TieredStore
from ragkv.retrieval import Retriever, TokenChunker
from ragkv.store import RemoteTier

from .rags import DOCUMENTS, TEMPLATE, TEXTS, TOKENIZER, WordEmbedder, open_rag, small_model


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def rag(model):
    with open_rag(model=model) as opened:
        opened.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        yield opened


@pytest.fixture
def pool(tmp_path):
    """The folder that is the pool."""
    return tmp_path / "pool"


@pytest.fixture
def machine(tmp_path, model, pool):
    """Opens RAGs over one pool, each with a folder of its own, or none; all are closed."""
    opened = []

    def make(
        folder=None, *, reads=True, embedder=None, other=None, template=TEMPLATE, secret=None, follow=False, **options
    ):
        path = folder and tmp_path / folder
        tier = RemoteTier(f"file://{pool}", readonly=reads, encryption_key=secret)
        store = TieredStore(path and path / "kv", cpu_bytes=64 << 20, remote=tier)
        engine = Engine(other or model, TOKENIZER, template=template, store=store, method=Reuse(), **options)
        retriever = Retriever.open(path and path / "documents", embedder or WordEmbedder())
        opened.append(RAG(engine, retriever, TokenChunker(TOKENIZER, 48)))
        if follow:
            opened[-1].follow()
        return opened[-1]

    yield make
    for rag in opened:
        rag.close()


@pytest.fixture
def filled(machine):
    """Whoever fills the pool, with three documents published."""
    rag = machine("fills", reads=False)
    rag.add_texts(list(TEXTS.values()), list(TEXTS), [{"n": number} for number in range(3)])
    published = rag.publish()
    assert (published.documents, published.unread) == (3, 0) and published.passages == len(rag.engine.store)
    return rag
