"""Arms whose documents were read behind the passages of others that are nearest to them."""

import numpy as np
import pytest

from ragkv import Reuse
from ragkv.evaluation import EvaluationError, Plan, parse_arms, with_neighbours
from ragkv.evaluation.scoring import Group


class Embedder:
    """A text's vector: how often each of a few words stands in it."""

    name = fingerprint = "five words"
    words = ("river", "harp", "glass", "firm", "staff")
    dimension = len(words) + 1

    def encode_query(self, text):
        vector = np.asarray([1, *(10 * text.lower().count(word) for word in self.words)], np.float32)
        return vector / np.linalg.norm(vector)

    def encode_documents(self, texts):
        return np.stack([self.encode_query(text) for text in texts])


@pytest.fixture(scope="module")
def cases(small_case):
    other = (("The river Tees is long.",), ("Glass is sold by a firm.",))
    more = small_case("b", documents=other, retrieved=((0, 0), (1, 0)), gold=())
    return with_neighbours([small_case(), more], Embedder())


def test_neighbours_are_of_the_documents_of_all_cases(cases, small_case):
    (_, firm, oslo), (tees, glass) = (case.behind for case in cases)
    assert {*oslo} == {"The river Tees is long.", "Anna lives in the north. The river is wide."}
    assert {*tees} == {"Anna lives in the north. The river is wide.", "Oslo lies on a river."}
    assert firm[0] == "Glass is sold by a firm." and glass[0].startswith(("Bell Works", "The company"))
    assert all(len(behind) == 2 for case in cases for behind in case.behind)
    assert cases[0].fingerprint == small_case().fingerprint
    blank = with_neighbours([small_case(documents=(("a river",), (" ",)), retrieved=((0, 0),), gold=())], Embedder())
    assert blank[0].behind == ((), ())


def test_an_arm_reads_behind_them(cases, tiny_bench):
    reading = tiny_bench.read(cases[0])
    for document, texts in enumerate(cases[0].behind):
        for place in [place for place in cases[0].whole if place[0] == document]:
            chain = reading.chunks["neighbours"][place].lineage()
            assert [chunk.ids for chunk in chain[:2]] == [tiny_bench.engine.encoder.chunk(text) for text in texts]
    arms = parse_arms(["reuse", "reuse@neighbours", "random=lego-link:k=3@neighbours", "lego-link:k=3@neighbours"], [])
    assert [arm.context for arm in arms if arm.method == Reuse()] == ["alone", "document", "neighbours"]
    rows = {row["arm"]: row for row in Group(tiny_bench, cases[0], 0, reading).rows(arms)}
    assert len({row["ids"] for row in rows.values()}) == 1
    assert len({rows[f"reuse@{context}"]["gold_nll"] for context in ("alone", "document", "neighbours")}) == 3
    tiny_bench.forget(reading)
    assert len(tiny_bench.engine.store) == 0


def test_such_an_arm_needs_neighbours(small_case, cases):
    arms = parse_arms(["reuse@neighbours"], [])
    with pytest.raises(EvaluationError, match="reuse@neighbours needs cases with neighbours"):
        Plan(model="m", data="d", cases=[small_case()], arms=arms)
    Plan(model="m", data="d", cases=cases, arms=arms)
