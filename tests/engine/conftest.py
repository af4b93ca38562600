"""What tests of the engine share: a tiny model, and an engine on it that recomputes nothing."""

import pytest
import torch
from transformers import DynamicCache

from ragkv import Engine, PromptTemplate, Reuse
from ragkv.testing import as_cache, random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10])
QUESTION = random_ids(6)


@pytest.fixture(scope="module")
def shared_model():
    return tiny_model()


@pytest.fixture
def engine(shared_model):
    return Engine(shared_model, template=TEMPLATE, method=Reuse())


def full(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, **as_cache(DynamicCache())).logits[:, -1]


class Seen:
    """A logits processor that keeps the ids and the scores of every step."""

    def __init__(self):
        self.steps = []

    def __call__(self, ids, scores):
        self.steps.append((ids.clone(), scores.clone()))
        return scores
