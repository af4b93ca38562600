"""Unions of methods that pick, look or have to have measured."""

import pytest

from ragkv import Engine, LegoLink, MethodError, PromptTemplate, QuestionAware, Reuse, SensitiveTokens, Union
from ragkv.methods import Auto
from ragkv.testing import random_ids, tiny_model

QUESTION = random_ids(6)


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_model(), template=PromptTemplate(prefix=[1, 5, 6], after_chunk=[10]))


def test_a_union_asks_what_its_methods_ask():
    for union in (Union(LegoLink(), SensitiveTokens()), Union(Auto(), LegoLink()), Union(Reuse(), Auto())):
        assert union.needs_sensitivity
    for union in (Union(LegoLink(), QuestionAware()), Union(Auto(LegoLink()), Reuse())):
        assert not union.needs_sensitivity
    with pytest.raises(MethodError, match="joins two methods, got 'auto'"):
        Union("auto", LegoLink())


def test_a_union_is_of_what_its_methods_pick(engine):
    """Auto picks for each prompt: a repair that looks, or nothing where every chunk is of one document."""
    document, other = engine.add_document([random_ids(20), random_ids(30)]), engine.add([random_ids(25)])
    got = engine.fuse([*other, *document], QUESTION, method=Union(Auto(), LegoLink(3)))
    want = engine.fuse([*other, *document], QUESTION, method=Union(SensitiveTokens(), LegoLink(3)))
    assert got.recomputed.tolist() == want.recomputed.tolist()
    assert got.report.method == repr(Union(SensitiveTokens(), LegoLink(3)))
    alone = engine.fuse(document[::-1], QUESTION, method=Union(LegoLink(3), Auto()))
    assert alone.report.method == "Union(first=LegoLink(k=3), second=Reuse())"
