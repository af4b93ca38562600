import pytest
import torch

from ragkv import Engine, PromptTemplate, Reuse, TieredStore
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10])


def near_model(**changes):
    """Whose chunks, put where they were not made, are off by some 0.05 nats."""
    return tiny_model(initializer_range=0.07, **changes)


def cases_of(engine, count, parts=1):
    """Two documents each, the later one in front: chunks that are not exact where they stand."""
    made = []
    for number in range(count):
        one = engine.add_document([random_ids(8, 100 + 3 * number)])
        two = engine.add_document([random_ids(6, 101 + 3 * number)] * parts)
        made.append(([*two, *one], random_ids(4, 102 + 3 * number)))
    return made


@pytest.fixture(scope="module")
def model():
    return near_model()


@pytest.fixture
def engine(model):
    return Engine(model, template=TEMPLATE, method=Reuse())


@pytest.fixture
def at():
    """Opens engines over one store, one after the other."""
    store = TieredStore()

    def open_engine(model, template=TEMPLATE, **options):
        return Engine(model, template=template, store=store, **options)

    return open_engine


@pytest.fixture(autouse=True)
def warned_anew():
    from ragkv.calibration import kept

    kept._warn.cache_clear()
    torch.manual_seed(0)
