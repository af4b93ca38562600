import pytest

from ragkv import PromptTemplate, bundled
from ragkv.evaluation import Bench, Case
from ragkv.evaluation.cases import everything
from ragkv.library.measured import Measured
from ragkv.testing import tiny_model

DOCUMENTS = (
    ("Anna lives in the north. The river is wide.", "She plays the harp. The night was cold."),
    ("Bell Works is a firm. It rained for most of the week.", "The company makes glass.", "It has a staff of 940."),
    ("Oslo lies on a river.",),
)


def _small_case(name="a", **changes):
    fields = {
        "id": name,
        "kind": "cross",
        "question": "What does Anna play?",
        "answers": ("harp",),
        "documents": DOCUMENTS,
        "retrieved": everything(DOCUMENTS),
        "gold": ((0, 1),),
    }
    return Case(**{**fields, **changes})


@pytest.fixture(scope="session")
def small_case():
    """Makes a case over three short documents."""
    return _small_case


@pytest.fixture(scope="session")
def loaded():
    return bundled.load()


@pytest.fixture(scope="session")
def bundled_bench(loaded):
    """Without measuring sensitivity, so that documents are read once."""
    return Bench(*loaded, PromptTemplate(**bundled.TEMPLATE), max_new_tokens=12, measured=Measured.NOTHING)


@pytest.fixture
def tiny_bench(loaded):
    """A random model with the bundled tokenizer: what it says means nothing, and everything is quick."""
    return Bench(tiny_model(vocab_size=1792), loaded[1], PromptTemplate(**bundled.TEMPLATE), max_new_tokens=4)
