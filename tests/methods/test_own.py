"""A method of somebody's own that does not say which tokens it wants is told so: none is taken for others."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ragkv import Auto, Engine, Method, MethodError, Selection, Union
from ragkv.methods import Reuse
from ragkv.testing import random_ids, tiny_model

WRONG = {
    "mask": lambda tokens: tokens > 3,
    "fractions": lambda tokens: tokens[:3] + 0.7,
    "list": lambda tokens: tokens.tolist()[:3],
    "array": lambda tokens: tokens.numpy()[:3],
    "nothing": lambda tokens: None,
    "one": lambda tokens: tokens[3],
    "rows": lambda tokens: tokens[:4].view(2, 2),
    "pairs": lambda tokens: torch.topk(tokens, 2),
}


@dataclass(frozen=True)
class Own(Method):
    """Gives its selection what it is made of, made of the reusable tokens."""

    given: dict[str, Any]

    def select(self, view):
        made = {name: make(view.layout.reusable) for name, make in self.given.items()}
        return Selection(**{"tokens": view.layout.reusable, **made}) if made.keys() != {"tokens"} else made["tokens"]

    def narrow(self, check):
        return self.given["tokens"](check.tokens) if "tokens" in self.given else check.tokens


@pytest.fixture(scope="module")
def fuse():
    engine = Engine(tiny_model())  # without a prefix, so that the slots 0 and 1 are a chunk's
    chunks = engine.add([random_ids(20), random_ids(9)])
    return lambda method: engine.fuse(chunks, [7, 8], method=method)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_chosen_must_be_slots(fuse, wrong):
    for method in (Own({"tokens": wrong}), Auto(Own({"tokens": wrong})), Union(Own({"tokens": wrong}), Reuse())):
        with pytest.raises(MethodError, match="by their slots"):
            fuse(method)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["context", "keep"])
def test_so_must_what_goes_along(fuse, name, wrong):
    if wrong(torch.arange(9)) is not None:
        with pytest.raises(MethodError, match="by their slots"):
            fuse(Own({name: wrong, "checks": lambda tokens: [1]}))


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_so_must_what_is_kept_at_a_check(fuse, wrong):
    class Narrowing(Own):
        def select(self, view):
            return Selection(view.layout.reusable, checks=[1])

    with pytest.raises(MethodError, match="by their slots"):
        fuse(Narrowing({"tokens": wrong}))


@pytest.mark.parametrize("layer", [-1, 4, 1.0, 1.5])
def test_layers_are_whole_numbers(fuse, layer):
    with pytest.raises(MethodError, match="check layers"):
        fuse(Own({"checks": lambda tokens: [layer]}))


def test_no_tokens_are_fine_in_any_tensor(fuse):
    assert not fuse(Own({"tokens": lambda tokens: torch.tensor([])})).report.budget
    assert fuse(Own({"tokens": lambda tokens: tokens[:3].int()})).recomputed.tolist() == [0, 1, 2, 29, 30]
