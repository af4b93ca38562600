import pytest

from tests.rag.rags import DOCUMENTS, open_rag, small_model


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def rag(model):
    with open_rag(model=model) as opened:
        opened.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        yield opened
