"""Forwards that threads ask for together: they run as one, and each gets what it would get alone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ragkv import Engine, LegoLink, MethodError, ModelChangedError, PromptTemplate
from ragkv.model import steps as module
from ragkv.model.rows import Rows
from ragkv.model.runner import Runner
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10], before_question=[11], after_question=[12, 13])
NO_END = {"max_new_tokens": 12, "eos_token_id": None}


@pytest.fixture
def patient(monkeypatch):
    """Steps wait for whoever decodes, however fast the model is."""
    monkeypatch.setattr(module, "_PATIENCE", 1000.0)


@pytest.fixture
def engine():
    return Engine(tiny_model(), template=TEMPLATE, method=LegoLink(4), piece_tokens=16)


def requests(engine, many=6):
    chunks = engine.add([random_ids(n) for n in (17, 20, 31)])
    return [([chunks[n % 3], chunks[(n + 1) % 3]], random_ids(5 + n)) for n in range(many)]


def at_once(work, items):
    ready = threading.Barrier(len(items))

    def begin(item):
        ready.wait()
        return work(item)

    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(begin, items))


def one_row(engine):
    return Rows(torch.tensor([5]), torch.tensor([0]), engine.decoder.cache(1))


class Scores:
    """A logits processor that keeps what it sees."""

    def __init__(self):
        self.seen = []

    def __call__(self, ids, scores):
        self.seen.append(scores.clone())
        return scores


def answered(engine, request, **options):
    scores = Scores()
    answer = engine.generate(*request, logits_processor=[scores], **NO_END, **options)
    return answer.token_ids, torch.cat(scores.seen)


def test_alone_or_among_others_the_same_answer(engine, patient):
    asked = requests(engine)
    alone = [answered(engine, request) for request in asked]
    steps = engine.runner.steps()
    before = steps.sizes.total(), sum(steps.sizes.elements())
    together = at_once(lambda request: answered(engine, request), asked)
    for (ids, scores), (others, other) in zip(alone, together, strict=True):
        assert ids == others
        assert float((scores - other).abs().max()) < 1e-4
    served = (sum(steps.sizes.elements()) - before[1]) / (steps.sizes.total() - before[0])
    assert served > 2  # they did run as one


def test_who_is_alone_waits_for_nobody_and_is_not_packed(engine, monkeypatch):
    packed = []
    monkeypatch.setattr(module, "run_packed", lambda *args: packed.append(args))
    monkeypatch.setattr(module.Condition, "wait", lambda *_: pytest.fail("waited"))
    answered(engine, requests(engine)[0])
    assert not packed


def test_seats_are_looked_at_under_the_lock(engine):
    """Others sit down and get up meanwhile, and a set must not change while it is gone through."""
    steps = engine.runner.steps()

    class Watched(set):
        def __iter__(self):
            assert steps._changed._is_owned()
            return super().__iter__()

    steps._seats = Watched()
    with steps.seat():
        answered(engine, requests(engine)[0])


def test_whoever_had_a_token_is_waited_for(engine, monkeypatch):
    """One comes back later from each token; the other's next one waits, and all are computed together."""
    asked, decoding, steps = requests(engine, 2), threading.Barrier(2), engine.runner.steps()
    assert steps.packs

    def work(number):
        seen = []

        def late(ids, scores):
            if not seen:
                decoding.wait()
                monkeypatch.setattr(module, "_PATIENCE", 1000.0)
            seen.append(number and time.sleep(0.02))
            return scores

        engine.generate(*asked[number], logits_processor=[late], **NO_END)

    at_once(work, range(2))
    assert sum(steps.sizes.elements()) - steps.sizes.total() >= NO_END["max_new_tokens"] - 1


def test_who_was_late_is_not_waited_for(engine):
    """A stream that is pulled slowly holds a seat; others go on without it until it is in time again."""
    steps = engine.runner.steps()
    with steps.seat() as seat:
        steps._step_s = 100.0
        assert steps._expected() == seat.served_s + 25
        seat.served_s -= 60
        steps.run(one_row(engine), engine.runner.fingerprint, seat)
        assert seat.slow and steps._expected() == 0
        steps._step_s = 100.0
        steps.run(one_row(engine), engine.runner.fingerprint, seat)
        assert not seat.slow and steps._expected() > seat.served_s
    assert steps._expected() == 0


def test_an_interrupted_forward_is_nobody_elses(engine, patient, monkeypatch):
    asked = requests(engine)
    alone = [answered(engine, request)[0] for request in asked]
    real, interrupted = module.run_packed, []

    def interrupts(decoder, parts):
        if interrupted:
            return real(decoder, parts)
        interrupted.append(threading.get_ident())
        raise KeyboardInterrupt

    def work(number):
        try:
            ended[number] = answered(engine, asked[number])[0]
        except KeyboardInterrupt:
            ended[number] = threading.get_ident()

    assert engine.runner.steps().packs
    monkeypatch.setattr(module, "run_packed", interrupts)
    ended = dict[int, object]()
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [ended[number] == ids for number, ids in enumerate(alone)].count(False) == 1
    assert interrupted[0] in ended.values()


def test_one_that_fails_does_not_take_the_others_along(engine, patient):
    asked = requests(engine)
    alone = [answered(engine, request)[0] for request in asked]

    def work(number):
        if number == 3:
            with pytest.raises(ZeroDivisionError):
                engine.generate(*asked[3], logits_processor=[lambda ids, scores: 1 / 0], **NO_END)
            return None
        return answered(engine, asked[number])[0]

    together = at_once(work, range(len(asked)))
    assert together == [ids if number != 3 else None for number, ids in enumerate(alone)]


def test_a_packed_forward_that_fails_is_run_one_by_one(engine, patient, monkeypatch):
    asked = requests(engine)
    alone = [answered(engine, request)[0] for request in asked]
    real, failed = module.run_packed, []

    def fails_behind_the_second_layer(decoder, parts):
        hook = decoder.layers[2].register_forward_pre_hook(lambda *_: failed.append(1) or 1 / 0)
        try:
            return real(decoder, parts)
        finally:
            hook.remove()

    assert engine.runner.steps().packs
    monkeypatch.setattr(module, "run_packed", fails_behind_the_second_layer)
    assert at_once(lambda request: answered(engine, request)[0], asked) == alone
    assert failed


def test_a_model_that_changed_is_told_to_each(engine):
    asked, model, decoding, changed = requests(engine, 3), engine.model, threading.Barrier(3), threading.Event()

    def work(number):
        steps = []

        def change(ids, scores):
            steps.append(ids)
            if len(steps) == 1:
                decoding.wait()
            if number == 0 and len(steps) == 5:
                with torch.no_grad():
                    model.get_output_embeddings().weight.add_(0.1)
                changed.set()
            if number and len(steps) == 9:  # nobody is done before
                assert changed.wait(60)
            return scores

        with pytest.raises(ModelChangedError, match="ask again"):
            engine.generate(*asked[number], logits_processor=[change], **NO_END)
        return len(steps)

    assert max(at_once(work, range(3))) < NO_END["max_new_tokens"]


def waiting(engine, work, items):
    """Threads that work on items, all of which wait for one forward; it begins when the block ends."""
    steps = engine.runner.steps()
    assert steps.packs
    with engine.runner.turn():
        threads = [threading.Thread(target=work, args=(item,), daemon=True) for item in items]
        for thread in threads:
            thread.start()
        while len(steps._waiting) < len(items):
            time.sleep(0.001)
    return threads


@pytest.mark.parametrize("how", ["comes", "leaves", "end"])
def test_a_meeting_waits_for_all_who_may_come(engine, how):
    meeting, here, go_on = module.Meeting(2), threading.Event(), threading.Event()

    def come():
        with meeting.seat(engine.runner.steps()):
            here.set()
            go_on.wait(30)

    first = threading.Thread(target=come, daemon=True)
    first.start()
    assert not here.wait(0.05)
    if how == "comes":
        with meeting.seat(engine.runner.steps()):
            assert here.wait(30)
    else:
        (meeting.leave if how == "leaves" else meeting.end)()
        assert here.wait(30)
    go_on.set()
    first.join(30)
    assert not engine.runner.steps()._seats


def test_the_model_is_compared_for_each_of_a_forward(engine):
    steps, found = engine.runner.steps(), dict[str, object]()

    def run(fingerprint):
        with steps.seat() as seat:
            try:
                found[fingerprint] = steps.run(one_row(engine), fingerprint, seat)
            except ModelChangedError as error:
                found[fingerprint] = error

    now, before = engine.runner.fingerprint, steps.sizes.total()
    for thread in waiting(engine, run, [now, "of another model"]):
        thread.join(30)
    assert steps.sizes.total() == before + 1
    assert isinstance(found["of another model"], ModelChangedError)
    torch.testing.assert_close(found[now], engine.decoder.forward(one_row(engine)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("most", "batches"), [(5, [1, 1, 1]), (6, [2, 1]), (7, [2, 1]), (9, [3])])
def test_a_step_has_so_many_rows_of_prompts(engine, monkeypatch, most, batches):
    monkeypatch.setattr(module, "_STEP_TOKENS", most)
    steps, ran = engine.runner.steps(), []
    real = steps._forward
    monkeypatch.setattr(steps, "_forward", lambda batch, found: (ran.append(len(batch)), real(batch, found)))

    def run(_):
        rows = Rows(torch.tensor([5, 6, 7]), torch.arange(3), engine.decoder.cache(3))
        steps.run(rows, engine.runner.fingerprint)

    for thread in waiting(engine, run, range(3)):
        thread.join(30)
    assert ran == batches


def test_a_model_that_does_not_pack_is_run_one_by_one(engine, monkeypatch):
    monkeypatch.setattr(module, "packs", lambda decoder: False)
    monkeypatch.setattr(module, "run_packed", lambda *_: pytest.fail("packed"))
    asked = requests(engine, 3)
    alone = [answered(engine, request)[0] for request in asked]
    assert at_once(lambda request: answered(engine, request)[0], asked) == alone


def test_who_cannot_have_the_model_asks_no_more(engine, monkeypatch):
    steps = engine.runner.steps()
    monkeypatch.setattr(steps, "turn", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps.run(one_row(engine), "")
    assert not steps._waiting and steps._leader is None


def test_whoever_gives_up_waits_for_rows_that_run(engine, monkeypatch):
    """They are written to a cache that is the caller's again afterwards."""
    steps, running, go_on, gave_up = engine.runner.steps(), threading.Event(), threading.Event(), threading.Event()
    forward, to_lead = steps._forward, steps._to_lead

    def slowly(batch, found):
        running.set()
        go_on.wait(30)
        forward(batch, found)

    def interrupted(asked):
        if asked.fingerprint != "":
            return to_lead(asked)
        running.wait(30)
        raise KeyboardInterrupt

    def run(fingerprint):
        with steps.seat() as seat:
            try:
                steps.run(one_row(engine), fingerprint, seat)
            except KeyboardInterrupt:
                gave_up.set()

    monkeypatch.setattr(steps, "_forward", slowly)
    monkeypatch.setattr(steps, "_to_lead", interrupted)
    waiting(engine, run, [engine.runner.fingerprint, ""])
    assert running.wait(30) and not gave_up.wait(0.2)
    go_on.set()
    assert gave_up.wait(30)


def test_pieces_of_a_prompt_take_single_rows_along(engine, patient):
    """One decodes while another's prompt is computed, in pieces: no piece runs by itself."""
    steps, first, long = engine.runner.steps(), requests(engine)[0], (list(engine.add([random_ids(200)])), [7, 8])
    sizes, real = [], module.run_packed

    def watched(decoder, parts):
        sizes.append(sorted(len(part) for part in parts))
        return real(decoder, parts)

    begun = threading.Event()

    def wait_for_the_other(ids, scores):
        begun.set()
        return scores

    def decode():
        return engine.generate(*first, logits_processor=[wait_for_the_other], max_new_tokens=40, eos_token_id=None)

    module_run, module.run_packed = module.run_packed, watched
    try:
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(decode)
            begun.wait()
            engine.fuse(*long, method="full-prefill")
            one.result()
    finally:
        module.run_packed = module_run
    assert [1, 16] in sizes
    assert steps is Runner.of(engine.model).steps()


def test_what_the_kernels_cannot_do_is_refused_among_others_too(patient):
    engine = Engine(tiny_model(), template=TEMPLATE, kernels="reference")
    assert engine.runner.steps("reference").packs
    [first, *_], chunks, begun = requests(engine), engine.add([random_ids(40)]), threading.Event()

    def begin(ids, scores):
        begun.set()
        return scores

    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(engine.generate, *first, logits_processor=[begin], **NO_END)
        begun.wait()
        with pytest.raises(MethodError, match="cannot hide keys"):
            engine.fuse(chunks, [7, 8], starts=[20])
        one.result()


def test_a_fork_decodes_by_itself(engine, forked, patient):
    asked = requests(engine)
    want = answered(engine, asked[0])[0]
    with engine.runner.steps().seat():  # of a thread that is not there in the child
        said = forked(lambda: answered(engine, asked[0])[0])
    assert said == str(want)
