"""One runner a model: turns in order, one probing, and no trace whatever engines and threads stand over it."""

import gc
import os
import threading
import time
import weakref

import pytest
import torch

from ragkv import ArgumentError, Engine, LegoLink, PromptTemplate, PromptTooLongError, UnsupportedModelError
from ragkv.model import runner
from ragkv.model.runner import Runner
from ragkv.model.turns import _after_fork_in_parent, _before_fork, _made, turns
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6])


def test_one_runner_for_all_engines():
    model = tiny_model()
    one, two = Engine(model, template=TEMPLATE), Engine(model, namespace="other", kernels="auto")
    assert one.runner is two.runner is Runner.of(model) and one.decoder is two.decoder
    assert Engine(model, kernels="reference").decoder is not one.decoder
    assert Runner.of(tiny_model()) is not one.runner
    gone = weakref.ref(model)
    del model, one, two
    gc.collect()
    assert gone() is None


def test_turns_are_reentrant_and_in_order():
    taken = turns(tiny_model().config)
    order, asked = [], []

    def work(name):
        for number in range(3):
            with taken, taken:
                order.append((name, number))
                while len(asked) < 3:  # the first one in waits until all others wait
                    asked_now.wait(5)

    asked_now, threads = threading.Event(), [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for number, thread in enumerate(threads, 1):
        thread.start()
        while len(order) + len(taken._waiting) < number:
            asked_now.wait(0.001)
        asked.append(number)
    asked_now.set()
    for thread in threads:
        thread.join()
    assert [name for name, _ in order] == list("abc") * 3
    assert taken._owner is None
    with pytest.raises(RuntimeError, match="must end"):
        taken.__exit__()


class Interrupted:
    """A lock on which Ctrl-C comes once: where it has been taken, or right behind the block that it holds."""

    def __init__(self, behind):
        self._lock, self._left, self._behind = threading.Lock(), 1, behind

    def __enter__(self):
        if self._left and not self._behind:
            self._left = 0
            raise KeyboardInterrupt
        self._lock.acquire()

    def __exit__(self, *_):
        self._lock.release()
        if self._left:
            self._left = 0
            raise KeyboardInterrupt


@pytest.mark.parametrize("behind", [False, True])
def test_an_interrupted_turn_is_given_back(behind):
    taken = turns(tiny_model().config)
    taken._guard = Interrupted(behind)
    with pytest.raises(KeyboardInterrupt):
        taken.__enter__()
    assert taken.free
    with taken:
        taken._guard = Interrupted(behind)
        taken.__enter__()
        taken.__exit__()
        with pytest.raises(KeyboardInterrupt):
            taken.__exit__()
        assert taken.free
        taken.__enter__()
    assert taken.free


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_threads_leave_the_attention_as_it_was(kernels):
    model = tiny_model()
    engines = [Engine(model, template=TEMPLATE, namespace=name, kernels=kernels) for name in ("a", "b")]
    chunks = engines[0].add([random_ids(20), random_ids(30)])
    want = engines[0].fuse(chunks[::-1], random_ids(5), method=LegoLink(k=4)).logits
    wrong = []

    def ask(engine):
        for _ in range(8):
            got = engine.fuse(chunks[::-1], random_ids(5), method=LegoLink(k=4))
            if float((got.logits - want).abs().max()) > 1e-4 or got.report.attention.startswith("ragkv"):
                wrong.append(got.report)

    threads = [threading.Thread(target=ask, args=(engines[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_room_for_the_answer_counts():
    engine = Engine(tiny_model(max_position_embeddings=64), template=TEMPLATE)
    chunks = engine.add([random_ids(50)])  # with prefix and question 59 tokens: 6 may follow, the last one unread
    for call in (
        lambda: engine.fuse(chunks, random_ids(6), room_tokens=7),
        lambda: engine.generate(chunks, random_ids(6), max_new_tokens=128),
        lambda: list(engine.generate(chunks, random_ids(6), max_new_tokens=128, num_beams=2).token_ids),
    ):
        with pytest.raises(PromptTooLongError, match="leave room for 6"):
            call()
    assert len(engine.generate(chunks, random_ids(6), max_new_tokens=6, eos_token_id=None).token_ids) == 6
    assert len(engine.generate(chunks, random_ids(6), eos_token_id=None).token_ids) == 6
    assert engine.fuse(chunks, random_ids(6)).logits.isfinite().all()


def test_numbers_are_checked():
    model = tiny_model()
    for name in ("document_tokens", "piece_tokens"):
        for value, error in ((0, ArgumentError), (-3, ArgumentError), (1.5, TypeError), (True, TypeError)):
            with pytest.raises(error, match=name):
                Engine(model, **{name: value})
    engine = Engine(model, template=TEMPLATE)
    chunks = engine.add([random_ids(5)])
    with pytest.raises(ArgumentError, match="room_tokens must be >= 0, got -1"):
        engine.fuse(chunks, random_ids(4), room_tokens=-1)
    with pytest.raises(ArgumentError, match="max_new_tokens"):
        engine.generate(chunks, random_ids(4), max_new_tokens=0)
    with pytest.raises(ArgumentError, match="behind_tokens"):
        engine.repair_document(chunks, [random_ids(5)], behind_tokens=-1)
    with pytest.raises(PromptTooLongError, match="the anchor has 70 tokens"):
        Engine(tiny_model(max_position_embeddings=64), template=PromptTemplate(prefix=random_ids(70)))


def test_a_fork_waits_for_the_pass(forked):
    """In the child nobody has the model, and its attention is as it was loaded, though another thread used it all the time."""
    model = tiny_model()
    engine = Engine(model, template=TEMPLATE)
    chunks, over = engine.add([random_ids(20), random_ids(30)])[::-1], threading.Event()

    def use():
        while not over.is_set():
            engine.fuse(chunks, random_ids(5), method=LegoLink(k=4))

    thread = threading.Thread(target=use)
    thread.start()
    try:
        for _ in range(5):
            assert forked(lambda: _answered(engine, model, chunks)) == "sdpa"
    finally:
        over.set()
        thread.join()
    assert model.config._attn_implementation == "sdpa"


def _answered(engine, model, chunks):
    attention = model.config._attn_implementation
    engine.fuse(chunks, random_ids(5), method=LegoLink(k=4))
    return attention


def test_a_fork_takes_the_model_before_the_store(forked):
    """As a pass does that reads the store: in the other order the two wait for each other."""
    assert forked(_fork_beside_a_reader, timeout_s=20) == "read"


def _fork_beside_a_reader():
    engine = Engine(tiny_model(), template=TEMPLATE)
    [chunk], taken = engine.add([random_ids(20)]), engine.decoder.turns
    begun, said = threading.Event(), []

    def read():
        with taken:
            begun.set()
            while not taken._waiting:  # until the fork waits
                time.sleep(0.001)
            said.append("read" if engine.store.get(engine.documents.key(chunk)) else "lost")

    thread = threading.Thread(target=read)
    thread.start()
    begun.wait()
    if os.fork() == 0:
        os._exit(0)
    thread.join()
    return said[0]


def test_a_fork_beside_somebody_who_makes_a_runner(forked_amid):
    model, other = tiny_model(), tiny_model()
    made = forked_amid(lambda: Engine(model), runner, "Weights", lambda: len(Engine(other).runner.fingerprint))
    assert made == str(len(Runner.of(other).fingerprint))


def test_forks_of_two_threads():
    """A fork takes the turns of every model there is, those of other tests among them."""
    models = [tiny_model(), tiny_model()]
    taken = [turns(model.config) for model in models]

    def fork():
        _before_fork()
        over.wait()
        _after_fork_in_parent()

    over, threads = threading.Event(), [threading.Thread(target=fork) for _ in "ab"]
    for thread in threads:
        thread.start()
    while not any(each._waiting for each in list(_made.values())):
        time.sleep(0.001)
    over.set()
    for thread in threads:
        thread.join()
    assert [each._owner for each in taken] == [None, None]


def test_autocast_is_refused():
    engine = Engine(tiny_model(), template=TEMPLATE, method=LegoLink(k=4))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UnsupportedModelError, match="autocast is on"):
        engine.add([random_ids(20)])
    assert len(engine.store) == 0 and len(engine.add([random_ids(20)])) == 1
