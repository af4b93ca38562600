"""What recomputed tokens may see, where a method limits it."""

import pytest
import torch

from ragkv import Engine, LegoLink, Method, MethodError, PromptTemplate, QuestionAware, Reuse, Selection, Union
from ragkv.testing import random_ids, tiny_model

# Without a prefix: its distance would change with a chunk's place, and what is computed afresh with it.
TEMPLATE = PromptTemplate(after_chunk=[10])
QUESTION = random_ids(6)
EXACT = 1e-4


class Seeing(Method):
    """Recompute every second token, which see of the other chunks what they are given."""

    def __init__(self, shown):
        self.shown = shown

    def tokens(self, layout):
        return layout.reusable[::2]

    def select(self, view):
        return Selection(self.tokens(view.layout), self.shown(view.layout))


class Narrowing(Seeing):
    """The same with all tokens, of which every second is dropped at a layer."""

    def select(self, view):
        return Selection(view.layout.reusable, self.shown(view.layout), checks=[1])

    def narrow(self, check):
        return check.tokens[::2]


def nothing(layout):
    return layout.reusable[:0]


def logits(engine, chunks, method):
    return engine.fuse(chunks, QUESTION, method=method).logits


@pytest.fixture(scope="module", params=["llama", "phi", "cohere", "gpt_neox", "falcon"])
def engine(request):
    return Engine(tiny_model(request.param), template=TEMPLATE)


@pytest.mark.parametrize("method", [Seeing, Narrowing])
def test_with_nothing_else_in_sight_a_chunk_stays_as_it_was_read(engine, method):
    """Chunks read alone saw themselves: computed again with no more than that, they are what they were."""
    chunks = engine.add([random_ids(n) for n in (20, 31, 9)])
    kept = logits(engine, chunks, Reuse())
    torch.testing.assert_close(logits(engine, chunks, method(nothing)), kept, atol=EXACT, rtol=0)
    assert float((logits(engine, chunks, method(lambda layout: None)) - kept).abs().max()) > 50 * EXACT


def test_with_everything_in_sight_nothing_is_limited(engine):
    chunks = engine.add([random_ids(n) for n in (20, 31, 9)])
    unlimited, limited = (
        logits(engine, chunks, Seeing(shown)) for shown in (lambda layout: None, lambda layout: layout.reusable)
    )
    torch.testing.assert_close(limited, unlimited, atol=EXACT, rtol=0)


def test_a_shown_chunk_is_all_that_is_seen(engine):
    """What stands in front and is not shown may be anything."""
    first, second, third, other = engine.add([random_ids(20, seed=n) for n in range(4)])

    class Last(Seeing):
        def tokens(self, layout):
            return layout.span(layout.chunks[2])

    def last_keys(chunks, shown):
        prompt = engine.fuse(chunks, QUESTION, method=Last(shown))
        start = prompt.input_ids.shape[1] - len(QUESTION) - len(third)
        return torch.stack([layer.keys[0, :, start : start + len(third)] for layer in prompt.past_key_values.layers])

    shown = lambda layout: layout.span(layout.chunks[1])  # noqa: E731
    torch.testing.assert_close(
        last_keys([first, second, third], shown), last_keys([other, second, third], shown), atol=EXACT, rtol=0
    )
    apart = last_keys([first, second, third], lambda layout: None) - last_keys(
        [other, second, third], lambda layout: None
    )
    assert float(apart.abs().max()) > 50 * EXACT


def test_a_context_of_other_tokens_is_refused():
    engine = Engine(tiny_model(), template=TEMPLATE)
    with pytest.raises(MethodError, match="not open"):
        logits(engine, engine.add([random_ids(9)]), Seeing(lambda layout: layout.suffix))


def test_kernels_asked_for_by_name_do_not_give_way():
    engine = Engine(tiny_model(), template=TEMPLATE, kernels="reference")
    with pytest.raises(MethodError, match="cannot hide keys"):
        logits(engine, engine.add([random_ids(9), random_ids(8)]), Seeing(nothing))


def test_question_aware_limits_what_is_seen():
    engine = Engine(tiny_model(), template=TEMPLATE)
    chunks = engine.add([random_ids(n) for n in (20, 31, 9)])
    open_, limited, closed = (logits(engine, chunks, QuestionAware(0.5, sees=sees)) for sees in (1.0, 0.3, 0.0))
    kept = logits(engine, chunks, Reuse())
    torch.testing.assert_close(closed, kept, atol=EXACT, rtol=0)
    assert all(float((limited - other).abs().max()) > 10 * EXACT for other in (open_, kept))
    with pytest.raises(MethodError, match="sees"):
        QuestionAware(sees=1.5)


def test_a_union_limits_what_both_limit():
    engine = Engine(tiny_model(), template=TEMPLATE)
    chunks = engine.add([random_ids(n) for n in (20, 31, 9)])
    limited, free = QuestionAware(0.3, sees=0.0), LegoLink(4)
    kept = logits(engine, chunks, Reuse())
    torch.testing.assert_close(logits(engine, chunks, Union(limited, limited)), kept, atol=EXACT, rtol=0)
    assert float((logits(engine, chunks, Union(limited, free)) - kept).abs().max()) > 10 * EXACT


def test_the_prefix_is_always_seen():
    engine = Engine(tiny_model(), template=PromptTemplate(prefix=[1, 5, 6, 7]))
    chunks = engine.add([random_ids(20)])  # where it was made
    kept = logits(engine, chunks, Reuse())
    torch.testing.assert_close(logits(engine, chunks, Seeing(nothing)), kept, atol=EXACT, rtol=0)
