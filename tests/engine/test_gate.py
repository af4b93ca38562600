"""The gate at run time: what is checked, what it does, and that nobody waits for it."""

import json
import logging
import threading
import time
from collections import deque
from dataclasses import replace

import pytest
import torch

from ragkv import (
    RAG,
    ArgumentError,
    ArgumentTypeError,
    Engine,
    FullPrefill,
    Gate,
    LegoLink,
    MethodError,
    Reuse,
    TieredStore,
)
from ragkv.cli import main
from ragkv.gate import _Window
from ragkv.testing import random_ids, tiny_model
from tests.fresh import fresh
from tests.rag.rags import WordEmbedder

from .conftest import QUESTION, TEMPLATE

EVERY = Gate(share=1.0, kl=0.05, checks=4, window=8, seed=0)


@pytest.fixture
def opened(shared_model):
    """Makes engines with a gate; reuse is far off on their model where chunks stand where they were not made."""
    made = []

    def engine(gate=EVERY, model=shared_model, **options):
        made.append(Engine(model, template=TEMPLATE, **{"method": Reuse(), "gate": gate, **options}))
        return made[-1]

    yield engine
    for each in made:
        each.close()


def far(engine, number=0):
    """A prompt whose chunks stand where they were not made."""
    return [*engine.add([random_ids(15, 9000 + number), random_ids(14, 8000 + number)])], QUESTION


def near(engine, number=0):
    """A prompt that reuse puts together exactly: a document in order, right behind the prefix."""
    return engine.add_document([random_ids(10, 7000 + number), random_ids(7, 6000 + number)]), QUESTION


def ask(engine, case, count=1, **more):
    for _ in range(count):
        prompt = engine.fuse(*case, **more)
        assert engine.gate.wait(30)
    return prompt


def checks(engine):
    return {method: item.count for method, item in engine.store.stats().checks.items()}


def test_an_exact_method_passes(opened, caplog):
    engine = opened()
    with caplog.at_level(logging.WARNING):
        for number in range(6):
            prompt = ask(engine, far(engine, number), method=LegoLink(1000))
    assert prompt.report.method == "LegoLink(k=1000)" and prompt.report.gate == ""
    found = engine.store.stats().checks["LegoLink(k=1000)"]
    assert found.count == found.agreed == 6 and found.mean_kl < 1e-9
    assert not engine.gate.tripped and not caplog.records


def test_past_the_bound_prompts_are_prefilled_in_full(opened, caplog):
    engine = opened()
    case = far(engine)
    with caplog.at_level(logging.WARNING):
        assert ask(engine, case, 3).report.gate == "" and not engine.gate.tripped  # too few to say anything
        before = ask(engine, case)
        assert before.report.method == "Reuse()"  # the fourth check came behind it
        after = ask(engine, case, 5)
    assert after.report.method == "FullPrefill()" and after.report.budget == 1
    want = engine.fuse(*case, method=FullPrefill())
    assert after.logits.equal(want.logits)
    assert (
        after.report.gate.startswith("mean KL 0.")
        and "of the last 4 checks of Reuse(), more than 0.05" in after.report.gate
    )
    assert after.report.gate.endswith(": FullPrefill() in its place") and want.report.gate == ""
    assert engine.gate.tripped == {"Reuse()": after.report.gate.split(": FullPrefill")[0]}
    [warning] = caplog.records
    assert "from now on full prefill in its place" in warning.message
    assert checks(engine) == {"Reuse()": 4}  # what is exact is not checked
    answer = engine.generate(*case, max_new_tokens=2)
    assert answer.report.fusion.gate == after.report.gate and "gate" in answer.report.as_dict()["fusion"]

    engine.gate.reset()
    assert ask(engine, case).report.method == "Reuse()" and not engine.gate.tripped


def test_other_methods_are_judged_by_their_own_checks(opened):
    engine = opened()
    case = far(engine)
    ask(engine, case, 4)
    assert engine.gate.tripped.keys() == {"Reuse()"}
    assert ask(engine, case, method=LegoLink(1000)).report.method == "LegoLink(k=1000)"
    assert ask(engine, case, method=LegoLink(1)).report.method == "LegoLink(k=1)"


def test_one_prompt_that_is_far_off_does_nothing(opened):
    engine = opened(replace(EVERY, kl=0.2))
    window = engine.gate._windows["Reuse()"] = _Window(deque([0.0] * 5, maxlen=8))
    case = far(engine)
    full, reused = engine.fuse(*case, method=FullPrefill()), engine.fuse(*case)
    reused.logits.mul_(0)
    assert engine.gate.wait(30) and len(window.kls) == 6 and not engine.gate.tripped
    assert full.report.gate == reused.report.gate == ""
    assert max(window.kls) <= 5 * 0.2  # whatever it was


def test_more_recompute_step_by_step(opened, caplog):
    ladder = [LegoLink(6), LegoLink(2), "reuse"]
    engine = opened(replace(EVERY, kl=1e-7, action="more", ladder=ladder))
    case, seen = far(engine), []
    with caplog.at_level(logging.WARNING):
        for _ in range(13):
            seen.append(ask(engine, case).report.method)
    assert seen == ["Reuse()"] * 4 + ["LegoLink(k=2)"] * 4 + ["LegoLink(k=6)"] * 4 + ["FullPrefill()"]
    assert len(caplog.records) == 3  # one a step
    other = opened(replace(EVERY, kl=1e-7, action="more", ladder=ladder))
    assert ask(other, case, 5, method=LegoLink(3)).report.method == "FullPrefill()"  # stands on no rung


def test_a_warning_alone(opened, caplog):
    engine = opened(replace(EVERY, action="warn"))
    case = far(engine)
    with caplog.at_level(logging.WARNING):
        prompt = ask(engine, case, 12)
    assert prompt.report.method == "Reuse()" and prompt.report.gate.startswith("mean KL ")
    assert len(caplog.records) == 1 and checks(engine) == {"Reuse()": 12}


def test_a_calibrated_method_is_watched_as_what_it_is(opened):
    engine = opened()
    cases = [far(engine, number) for number in range(4)]
    engine.calibrate(cases, kl=2.9, cap=3.0, ladder=[Reuse()])
    assert not checks(engine)  # nothing stands in for what a calibration measures, and nothing of it is checked
    assert ask(engine, cases[0], 4, method="calibrated").report.method == "Calibrated(Reuse())"
    assert checks(engine) == {"Calibrated(Reuse())": 4}
    assert ask(engine, cases[0], method="calibrated").report.method == "FullPrefill()"
    others = [far(engine, number) for number in range(20, 24)]
    [rung] = engine.calibrate(others, kl=2.9, cap=3.0, ladder=[Reuse()]).rungs
    assert rung.cases == 2 and rung.budget == 0 and rung.mean > 0  # reuse is measured, and not what stands in its place


def drawn(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(engine.gate, "_checked", lambda check, closing: seen.append(check.ids.tolist()))
    return seen


def test_the_same_seed_draws_the_same_prompts(opened, monkeypatch):
    runs = []
    for seed in (7, 7, 8):
        engine = opened(replace(EVERY, share=0.3, seed=seed))
        seen = drawn(engine, monkeypatch)
        case, counts = far(engine), []
        for _ in range(15):
            ask(engine, case)
            counts.append(len(seen))
        runs.append(counts)
    assert runs[0] == runs[1] != runs[2] and 2 < runs[0][-1] < 10


def test_exact_prompts_are_not_drawn(opened, monkeypatch):
    engine = opened()
    seen, case = drawn(engine, monkeypatch), far(engine)
    ask(engine, case, method=FullPrefill())
    ask(engine, near(engine))
    ask(engine, ([], QUESTION))
    ask(engine, case, starts=[10, 40])  # no model would be given it
    assert not seen
    ask(engine, case)
    assert len(seen) == 1


def test_answers_are_the_same_alone_and_among_others(opened, shared_model):
    plain = Engine(shared_model, template=TEMPLATE, method=Reuse())
    cases = [far(plain, number) for number in range(4)]
    want = [plain.generate(*case, max_new_tokens=6).token_ids for case in cases]
    engine = opened(replace(EVERY, action="warn", patience_s=0.0))
    got = [[] for _ in cases]

    def work(number):
        for _ in range(3):
            got[number].append(engine.generate(*cases[number], max_new_tokens=6).token_ids)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[ids] * 3 for ids in want]
    assert engine.gate.wait(60) and 0 < checks(engine)["Reuse()"] <= 12
    assert shared_model.config._attn_implementation == "sdpa"


def test_a_later_turn_is_compared_with_all_that_was_said(opened):
    engine = opened(replace(EVERY, action="warn"))
    exact, off = near(engine), far(engine)
    for case, close in ((exact, True), (off, False)):
        engine.store._tiers.tally.checks.clear()
        first = engine.generate(*case, max_new_tokens=3, keep_past=True)
        assert engine.gate.wait(30) and checks(engine) == ({} if close else {"Reuse()": 1})
        engine.generate([], random_ids(4), past=first.past, max_new_tokens=3)
        assert engine.gate.wait(30)
        found = engine.store.stats().checks["Reuse()"]
        assert found.count == (1 if close else 2) and (found.kl < 1e-6) == close


def test_a_conversation_keeps_what_stands_there(opened, caplog):
    """Behind earlier turns a full prefill is of what is new; it is not checked, and nobody is warned again."""
    engine = opened()
    case = far(engine)
    first = engine.generate(*case, max_new_tokens=2, keep_past=True)
    ask(engine, case, 4)
    assert engine.gate.tripped and len(caplog.records) == 1
    before = checks(engine)
    for number in range(5):
        more = engine.add([random_ids(9, 50 + number)])
        report = engine.generate(more, random_ids(3), past=first.past, max_new_tokens=1).report.fusion
        assert report.method == "FullPrefill()" and report.gate and engine.gate.wait(30)
    assert checks(engine) == before and len(caplog.records) == 1


def test_a_check_waits_until_nobody_needs_the_model(opened):
    engine = opened()
    case = far(engine)
    with engine.runner.turn():
        engine.fuse(*case)
        assert not engine.gate.wait(0.4) and not checks(engine)
    assert engine.gate.wait(30) and checks(engine) == {"Reuse()": 1}


def test_a_check_does_not_wait_for_ever(opened):
    """The model is never free for long: behind its patience a check stands in line."""
    engine = opened(replace(EVERY, patience_s=0.0))
    case, ended = far(engine), threading.Event()

    def busy():
        while not ended.is_set():
            with engine.runner.turn():
                time.sleep(0.005)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        engine.fuse(*case)
        assert engine.gate.wait(30) and checks(engine) == {"Reuse()": 1}
    finally:
        ended.set()
        thread.join()


def test_a_long_prompt_takes_a_turn_a_piece(opened, monkeypatch):
    engine = opened()
    chunks = engine.add([random_ids(300), random_ids(200)])
    begun = engine.runner._turns.taken
    engine.fuse(chunks, QUESTION, method=LegoLink(2))
    after = engine.runner._turns.taken
    assert engine.gate.wait(30)
    assert engine.runner._turns.taken - after >= 4 > after - begun
    [found] = engine.store.stats().checks.values()
    want = engine.fuse(chunks, QUESTION, method=FullPrefill())
    mine = engine.fuse(chunks, QUESTION, method=LegoLink(2))
    p, q = (prompt.logits.double().log_softmax(-1) for prompt in (want, mine))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)


def test_closing_ends_what_waits(opened):
    engine = opened()
    case, held, free = far(engine), threading.Event(), threading.Event()

    def hold():
        with engine.runner.turn():
            held.set()
            free.wait(30)

    for _ in range(12):  # more than wait at most
        engine.fuse(*case)
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    engine.close()
    free.set()
    thread.join()
    assert engine.gate.wait(5) and not any(each.name.startswith("a check") for each in threading.enumerate())
    engine.close()  # twice is fine


def test_a_model_that_changed_meanwhile_is_not_compared(shared_model):
    model = tiny_model(seed=4)
    with Engine(model, template=TEMPLATE, method=Reuse(), gate=EVERY) as engine:
        case = far(engine)
        with engine.runner.turn():
            engine.fuse(*case)
            with torch.no_grad():
                model.lm_head.weight[7] += 1
        assert engine.gate.wait(30) and not checks(engine) and not engine.gate.tripped


def test_a_check_that_fails_harms_nobody(opened, monkeypatch, caplog):
    engine = opened()
    case = far(engine)
    monkeypatch.setattr("ragkv.gate.divergence", lambda *_: 1 / 0)
    with caplog.at_level(logging.WARNING):
        ask(engine, case)
    monkeypatch.undo()
    assert "gave up: ZeroDivisionError" in caplog.text
    ask(engine, case)
    assert checks(engine) == {"Reuse()": 1}


def test_a_fork_begins_with_no_checks(opened, forked):
    engine = opened()
    case = far(engine)

    def child():
        mine = engine.gate.wait(0)
        engine.fuse(*case)
        return mine, engine.gate.wait(30), checks(engine)

    engine.fuse(*case)  # its check waits, in the parent
    said = forked(child)
    assert said == "(True, True, {'Reuse()': 1})"
    assert engine.gate.wait(30) and checks(engine) == {"Reuse()": 1}


def test_an_ending_process_does_not_wait(warm):
    """Its check would never have its turn, and the program ends in good order."""
    code = (
        "import ragkv; from ragkv.testing import tiny_model, random_ids\n"
        "engine = ragkv.Engine(tiny_model(), method=ragkv.Reuse(), gate=ragkv.Gate(share=1.0, patience_s=60))\n"
        "chunks = engine.add([random_ids(9), random_ids(8)])\n"
        "turn = engine.runner.turn(); turn.__enter__()\n"
        "engine.fuse(chunks, [4]); print(engine.gate.wait(0.2))"
    )
    assert fresh(code, python=warm) == "False"


def test_figures_are_kept_with_the_store(tmp_path, shared_model, capsys):
    pytest.importorskip("prometheus_client")
    from prometheus_client import CollectorRegistry, generate_latest

    from ragkv.store.metrics import StoreCollector

    for _ in range(2):
        with Engine(
            shared_model, template=TEMPLATE, method=Reuse(), gate=EVERY, store=TieredStore(tmp_path / "kv")
        ) as engine:
            case = far(engine)
            ask(engine, case, 2)
            registry = CollectorRegistry()
            StoreCollector(engine.store, registry)
            text = generate_latest(registry).decode()
            assert 'ragkv_store_checks_total{method="Reuse()"} 2.0' in text
            assert 'ragkv_store_checks_kl_nats_total{method="Reuse()"} 0.' in text
            assert 'ragkv_store_checks_agreed_total{method="Reuse()"} ' in text
    (tmp_path / "documents").mkdir()
    assert main(["stats", "--path", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["history"]["checks"]["Reuse()"]
    assert found["count"] == 4 and found["mean_kl"] > 0.01 and 0 <= found["agreed"] <= 4
    assert main(["stats", "--path", str(tmp_path)]) == 0
    assert "checked against full prefill" in capsys.readouterr().out


def test_a_rag_has_one_too():
    with RAG.from_pretrained(embedder=WordEmbedder(), gate=EVERY, sensitivity=False, method="reuse") as rag:
        rag.add_texts(["Draycliff lies on the Tees.", "Clearport lies on the Wear."])
        assert rag.ask("Where is Draycliff?", max_new_tokens=1).report.fusion.gate == ""
        session = rag.session()
        session.ask("Where is Draycliff?", max_new_tokens=1)
        session.ask("And Clearport?", max_new_tokens=1)
        for _ in rag.stream("Where is Clearport?", max_new_tokens=1)[1]:
            pass
        assert rag.engine.gate.wait(60) and checks(rag.engine) == {"Reuse()": 4}


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"share": 0}, ArgumentError, "share must lie in 0 .. 1"),
        ({"share": "1"}, ArgumentTypeError, "share must be a number"),
        ({"kl": 0.0}, ArgumentError, "kl must be more than 0"),
        ({"kl": float("nan")}, ArgumentError, "kl must be more than 0"),
        ({"patience_s": -1}, ArgumentError, "patience_s at least 0"),
        ({"action": "stop"}, ArgumentError, "one of full, more, warn, got 'stop'"),
        ({"checks": 0}, ArgumentError, "checks must be >= 1"),
        ({"checks": 30, "window": 20}, ArgumentError, "window must be >= 30"),
        ({"seed": 0.5}, ArgumentTypeError, "seed must be a whole number"),
        ({"ladder": ["nonsense"]}, MethodError, "no method 'nonsense'"),
        ({"ladder": ["calibrated"]}, MethodError, "is no step of a ladder"),
        ({"ladder": "reuse"}, ArgumentTypeError, "ladder must be a list"),
    ],
)
def test_what_makes_no_sense_is_refused(options, kind, said):
    with pytest.raises(kind, match=said):
        Gate(**options)


def test_a_gate_must_be_one(shared_model):
    with pytest.raises(ArgumentTypeError, match=r"gate must be a ragkv.Gate, as ragkv.Gate\(share"):
        Engine(shared_model, gate=0.01)
