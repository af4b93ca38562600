"""What a prompt and its answer really take in memory is no more than the line was told."""

import pytest

from ragkv import Engine, PromptTemplate, Scheduler
from ragkv.model.cache import FusedCache
from ragkv.scheduling.policies import FirstComeFirstServed
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10], before_question=[11], after_question=[12, 13])
TOKEN_BYTES = 4 * 2 * 2 * 16 * 4  # layers, keys and values, heads, dimensions, fp32
VOCABULARY = tiny_model().config.vocab_size
METHODS = (
    *("reuse", "lego-link:k=4", "cache-blend:ratio=0.3", "full-prefill"),
    *("sensitive-tokens:ratio=0.2", "question-aware:ratio=0.2"),
)


class Promised(FirstComeFirstServed):
    def __init__(self):
        self.tickets = []

    def began(self, ticket, waiting):
        self.tickets.append(ticket)


def size(cache):
    return sum(layer.key_room.nbytes + layer.value_room.nbytes for layer in cache.layers)


@pytest.fixture
def taken(monkeypatch):
    """The most that a cache took, of whatever was made or has grown."""
    most = [0]

    def looked(kind, name):
        real = getattr(kind, name)

        def method(self, *args, **options):
            real(self, *args, **options)
            if isinstance(self, FusedCache):
                most[0] = max(most[0], size(self))

        monkeypatch.setattr(kind, name, method)

    for name in ("__init__", "batch_repeat_interleave", "reorder_cache", "reserve"):
        looked(FusedCache, name)
    return most


def engine_with(policy):
    return Engine(tiny_model(), template=TEMPLATE, scheduler=Scheduler(policy))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}, {"num_beams": 3}], ids=str)
def test_an_answer(method, options, taken):
    policy = Promised()
    engine = engine_with(policy)
    chunks = engine.add([random_ids(20), random_ids(31)])
    engine.generate(chunks, random_ids(5), method=method, max_new_tokens=1)
    taken[0] = 0
    engine.generate(chunks, random_ids(5), method=method, max_new_tokens=9, eos_token_id=None, **options)
    (ticket,) = policy.tickets[1:]
    copies = options.get("num_beams", 1)
    scores = 16 * copies * VOCABULARY if copies > 1 else 0
    assert taken[0] == ticket.needs_bytes - scores == copies * (ticket.tokens + 9) * TOKEN_BYTES
    assert ticket.answer_bytes == ticket.needs_bytes - ticket.tokens * TOKEN_BYTES


@pytest.mark.parametrize("room", [None, 5])
def test_a_fused_prompt(room, taken):
    policy = Promised()
    engine = engine_with(policy)
    chunks = engine.add([random_ids(20)])
    engine.fuse(chunks, random_ids(5))
    taken[0] = 0
    engine.fuse(chunks, random_ids(5), room_tokens=room)
    assert taken[0] == policy.tickets[-1].needs_bytes
    prompts = engine.fuse_many([(chunks, random_ids(5 + n)) for n in range(3)], room_tokens=room)
    assert policy.tickets[-1].needs_bytes == sum(size(prompt.past_key_values) for prompt in prompts)


def test_turns_behind_a_past():
    policy, past = Promised(), None
    engine = engine_with(policy)
    chunks = engine.add([random_ids(20)])
    for turn in range(4):
        given, question = chunks if past is None else [], random_ids(5 + turn)
        options = {"past": past, "keep_past": True, "max_new_tokens": 6, "eos_token_id": None}
        past = engine.generate(given, question, **options).past
        assert size(past.cache) == policy.tickets[-1].needs_bytes
