"""Many at once for a while: no wrong answer, nothing left behind. A seed repeats what is asked."""

import asyncio
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from weakref import ref

import pytest

from ragkv import Engine, Fair, PromptTemplate, RecordError, Scheduler, TieredStore
from ragkv.model import steps as module
from ragkv.model.cache import FusedCache
from ragkv.store.batch import Batch
from ragkv.streaming import stoppable
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10], before_question=[11], after_question=[12, 13])
METHODS = (
    *("reuse", "lego-link:k=4", "cache-blend:ratio=0.3", "full-prefill"),
    *("sensitive-tokens:ratio=0.2", "question-aware:ratio=0.2"),
)
NAMESPACES = ("", "one", "two", "three")


class Cancelled(Exception):
    pass


def cancel_at(tokens):
    """A logits processor that gives up behind so many tokens."""
    seen = []

    def count(ids, scores):
        seen.append(1)
        if len(seen) > tokens:
            raise Cancelled
        return scores

    return count


def caches():
    """The caches that anybody holds."""
    gc.collect()
    return {ref(one) for one in gc.get_objects() if type(one) is FusedCache}


def damaged_now_and_then(reading, rng):
    """A batch's reading that finds a record damaged now and then, drops it, and says so; to a thread once: a disk on which a
    record that was written anew is damaged again is given up.
    """
    seen = set()

    @contextmanager
    def found(self, index):
        with reading(self, index) as source:
            if rng.random() < 0.01 and (one := (threading.get_ident(), self.keys[index])) not in seen:
                seen.add(one)
                raise RecordError("a bit was flipped")
            yield source

    return found


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("paths", [False, True], ids=["chunks", "paths"])
def test_soak(tmp_path, monkeypatch, seed, paths):
    monkeypatch.setattr(module, "_PATIENCE", 20.0)
    before = caches()  # of other tests in this process
    rng, requests = random.Random(seed), 60 if seed == 0 else 200
    kv = 31 * 4 * 2 * 2 * 16 * 4  # bytes of the longest chunk
    store = TieredStore(tmp_path / "kv", cpu_bytes=4 * kv, disk_bytes=1 << 20)
    line = Scheduler(Fair(slack=100), memory_bytes=8 * 150 * 4 * 2 * 2 * 16 * 4)
    with Engine(tiny_model(), template=TEMPLATE, store=store, scheduler=line, paths=paths) as engine:
        texts = [random_ids(rng.randrange(8, 30)) for _ in range(12)]
        asked = []
        for _ in range(requests):
            namespace = rng.choice(NAMESPACES)
            given = rng.sample(texts, rng.randrange(1, 4)), random_ids(rng.randrange(4, 12))
            method = "full-prefill" if paths else rng.choice(METHODS)  # the others say more where more is exact
            options = {"method": method, "namespace": namespace, "max_new_tokens": rng.randrange(1, 14)}
            asked.append((given, options, rng.choice([None, None, None, 3])))

        def ask(one):
            (chunks, question), options, gives_up = one
            more = {} if gives_up is None else {"logits_processor": [cancel_at(gives_up)]}
            try:
                return engine.generate(chunks, question, eos_token_id=None, **options, **more).token_ids
            except Cancelled:
                return "cancelled"

        want = [ask(one) for one in asked]
        monkeypatch.setattr(Batch, "_reading", damaged_now_and_then(Batch._reading, random.Random(seed)))
        stop = threading.Event()

        def forget():
            mine = random.Random(seed)
            while not stop.wait(0.02):
                engine.forget(engine.add([mine.choice(texts)]), namespace=mine.choice(NAMESPACES))

        async def aask(one, gives_up):
            (chunks, question), options, _ = one
            work = stoppable(pool, engine.generate, chunks=chunks, question=question, eos_token_id=None, **options)
            try:
                return (await asyncio.wait_for(work, 0.05 if gives_up else None)).token_ids
            except TimeoutError:
                return "cancelled"

        async def coroutines():
            drawn = random.Random(seed)
            return await asyncio.gather(*[aask(one, drawn.random() < 0.3) for one in asked[::2]])

        forgetting = threading.Thread(target=forget)
        forgetting.start()
        try:
            with ThreadPoolExecutor(20) as pool, ThreadPoolExecutor(21) as threads:
                awaited = threads.submit(asyncio.run, coroutines())
                got = list(threads.map(ask, asked[1::2]))
                awaited = awaited.result()
        finally:
            stop.set()
            forgetting.join()
        assert got == want[1::2]
        alone = [ask((given, options, None)) for given, options, _ in asked[::2]]
        assert [one for one in zip(awaited, alone, strict=True) if one[0] not in ("cancelled", one[1])] == []
        assert sum(one != "cancelled" for one in awaited) > len(awaited) / 2
        steps, line = engine.runner.steps(), engine.scheduler.stats()
        assert sum(steps.sizes.elements()) > steps.sizes.total()  # they did run together
        assert (line.waiting, line.running, line.bytes) == (0, 0, 0)
        assert {*line.namespaces} == {*NAMESPACES}
        assert not steps._waiting and not steps._seats and steps._leader is None
        assert engine.decoder.attention == "sdpa"
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in engine.model.modules())
    assert caches() <= before  # no prompt's cache is left
