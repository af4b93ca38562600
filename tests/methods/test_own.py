"""A method of somebody's own that does not say which tokens it wants is told so: none is taken for others."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ragkv import Auto, Engine, FullPrefill, Method, MethodError, PromptTemplate, Selection, Union
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


@pytest.mark.parametrize("ratio", [1.0, 0.5], ids=["all", "half"])
def test_a_check_shows_what_is_stored_and_what_is_fresh_of_its_tokens(ratio):
    """Of all tokens, which are computed piece by piece up to the check, and of scattered ones, computed in one go."""
    model, seen = tiny_model(), []
    engine = Engine(model, template=PromptTemplate(prefix=[1, 5, 6]))

    class Checking(Method):
        needs_sensitivity = False

        def select(self, view):
            tokens = view.layout.reusable
            return Selection(tokens[:: round(1 / ratio)], checks=(1,))

        def narrow(self, check):
            seen.append(check)
            return check.tokens[:3]

    chunks = engine.add([random_ids(12, seed=1), random_ids(9, seed=2)])[::-1]
    engine.fuse(chunks, random_ids(5), method=Checking())
    stored, fresh = (
        engine.fuse(chunks, random_ids(5), method=m).past_key_values.layers[1] for m in (Reuse(), FullPrefill())
    )
    (check,) = seen
    torch.testing.assert_close(check.stored_keys, stored.keys[0][:, check.tokens])
    torch.testing.assert_close(check.stored_values, stored.values[0][:, check.tokens])
    if ratio == 1:
        torch.testing.assert_close(check.fresh_keys, fresh.keys[0][:, check.tokens], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(check.fresh_values, fresh.values[0][:, check.tokens], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(check.fresh_values, check.stored_values, atol=1e-4)
