"""A prompt begun while a reranker works: no answer changes by it, nothing stays behind, and it is in nobody's way."""

import asyncio
import gc
import threading
import time
from dataclasses import dataclass

import pytest

from ragkv import Gate, LegoLink, Method, RagKVError, RetrievalError, Reuse, Scheduler, SensitiveTokens
from ragkv.finding import Finder, Found
from ragkv.model.generation import Stop

from .rags import DOCUMENTS, QUESTION, open_rag, small_model

SHORT = {"max_new_tokens": 3, "eos_token_id": None}
STAYS, TURNS = 1, -1  # what a reranker does to the order


def ahead(rag):
    return rag._asking._ahead


def in_background():
    return threading.current_thread().name == "a prompt begun ahead"


def reranker(rag, sign=STAYS, then=lambda: None):
    """It takes its time: until what was begun is done."""

    def rerank(question, texts):
        assert ahead(rag).background.wait(30)
        time.sleep(0.002)
        then()
        return [-sign * number for number in range(len(texts))]

    return rerank


def slow(question, texts):
    time.sleep(0.002)
    return [-number for number in range(len(texts))]


def said(answer):
    return answer.token_ids, answer.sources, answer.report.fusion.method, answer.report.fusion.tokens


def nothing_is_left(rag):
    gc.collect()
    latest = ahead(rag)._latest
    stats = rag.engine.stats().line
    return (
        ahead(rag).background.wait(30)
        and (latest is None or latest() is None or latest().over)
        and not rag.engine.store._tiers.leases
        and (stats.waiting, stats.running) == (0, 0)
    )


def forwards(rag):
    return rag.engine.runner.steps().sizes.total()


@pytest.fixture
def warm(rag):
    """One whose last reranker was seen to be slow."""
    assert rag.ask(QUESTION, rerank=slow, **SHORT).report.fusion.speculated == "", "nothing was seen yet"
    return rag


@dataclass(frozen=True)
class Held(Method):
    """Reuse, held up where it is begun ahead."""

    begun, go = threading.Event(), threading.Event()

    def select(self, view):
        if in_background():
            self.begun.set()
            assert self.go.wait(30)
        return Reuse().select(view)


@pytest.fixture
def held():
    Held.begun.clear(), Held.go.clear()
    yield Held()
    Held.go.set()


@pytest.mark.parametrize(("sign", "outcome"), [(STAYS, "used"), (TURNS, "dropped")])
@pytest.mark.parametrize("options", [{}, {"method": SensitiveTokens(0.3)}, {"order": "best-last", "neighbours": 1}])
def test_the_answer_is_the_same(warm, sign, outcome, options):
    options = {"top_k": 3, **SHORT, **options}
    rerank = reranker(warm, sign)
    warm.retriever._second_s = 0.0
    plain = warm.ask(QUESTION, rerank=rerank, **options)
    assert plain.report.fusion.speculated == ""
    warm.retriever._second_s = 1.0
    answer = warm.ask(QUESTION, rerank=rerank, **options)
    assert said(answer) == said(plain) and answer.report.fusion.speculated == outcome
    assert answer.report.as_dict()["fusion"]["speculated"] == outcome
    hits, pieces = warm.stream(QUESTION, rerank=rerank, **options)
    assert hits == plain.sources and "".join(pieces) == plain.text
    assert pieces.report.fusion.speculated == outcome
    assert asyncio.run(warm.aask(QUESTION, rerank=rerank, **options)).token_ids == plain.token_ids
    assert nothing_is_left(warm)


def test_nothing_is_left_to_compute(warm):
    seen = []
    rerank = reranker(warm, then=lambda: seen.append(forwards(warm)))
    answer = warm.ask(QUESTION, rerank=rerank, max_new_tokens=1)
    assert answer.report.fusion.speculated == "used" and forwards(warm) == seen[0] > 0


@pytest.mark.parametrize(
    "asked",
    [
        {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]},
        {"system": "Say little."},
        {"namespace": "other"},
    ],
    ids=["messages", "system", "namespace"],
)
def test_whatever_is_asked(warm, asked):
    warm.add_texts(list(DOCUMENTS.values())[:2], namespace="other")
    if "messages" in asked:
        asked = {"messages": [*asked["messages"], {"role": "user", "content": QUESTION}]}
    else:
        asked = {"question": QUESTION, **asked}
    answer = warm.ask(**asked, rerank=reranker(warm), **SHORT)
    warm.retriever._second_s = 0.0
    assert answer.report.fusion.speculated == "used"
    assert said(answer) == said(warm.ask(**asked, rerank=reranker(warm), **SHORT))


def test_one_that_is_not_done_is_waited_for(warm, held):
    def rerank(question, texts):
        assert Held.begun.wait(30)
        threading.Timer(0.05, Held.go.set).start()
        return [-number for number in range(len(texts))]

    assert warm.ask(QUESTION, rerank=rerank, method=held, **SHORT).report.fusion.speculated == "used"
    assert nothing_is_left(warm)


def test_one_that_is_wrong_ends_before_its_next_piece(warm, held):
    def rerank(question, texts):
        assert Held.begun.wait(30)
        return list(range(len(texts)))

    ran = []

    class Answer(threading.Thread):
        def run(self):
            ran.append(warm.ask(QUESTION, rerank=rerank, method=held, max_new_tokens=1))

    asking = Answer()
    asking.start()
    asking.join(30)
    assert ran[0].report.fusion.speculated == "dropped", "the answer did not wait for it"
    before = forwards(warm)
    Held.go.set()
    assert nothing_is_left(warm) and forwards(warm) == before


@pytest.mark.parametrize("lost", [False, True])
def test_one_that_is_wrong_ends_in_the_middle_and_leaves_nothing(model, lost):
    passes, begun = [], threading.Event()

    def first_layer(*_):
        if in_background():
            passes.append(1)
            begun.set()
            end = time.monotonic() + 30
            while not ahead(rag)._latest().over and time.monotonic() < end:
                time.sleep(0.001)

    def rerank(question, texts):
        assert begun.wait(30)
        return list(range(len(texts)))

    with open_rag(model=model, piece_tokens=16, method=LegoLink(k=16)) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        if lost:
            rag.engine.store.remove_many(rag.engine.documents.keys(rag.chunks(rag.retrieve(QUESTION, 50))))
        rag.retriever._second_s, hook = 1.0, model.model.layers[0].register_forward_pre_hook(first_layer)
        try:
            answer = rag.ask(QUESTION, top_k=3, rerank=rerank, **SHORT)
        finally:
            hook.remove()
        assert len(passes) == 1, "one of several pieces"
        assert answer.report.fusion.speculated == "dropped" and nothing_is_left(rag)
        assert said(answer) == said(rag.ask(QUESTION, top_k=3, rerank=rerank, **SHORT))


def test_whoever_comes_meanwhile_goes_first(warm, held):
    def rerank(question, texts):
        assert Held.begun.wait(30)
        other = warm.engine.stream(["Another passage."], "What?", max_new_tokens=8, min_new_tokens=8)
        next(other)
        before = forwards(warm)
        Held.go.set()
        assert ahead(warm).background.wait(30) and forwards(warm) == before
        others.append(other)
        return [-number for number in range(len(texts))]

    others = []
    answer = warm.ask(QUESTION, rerank=rerank, method=held, **SHORT)
    assert answer.report.fusion.speculated == "dropped"
    assert said(answer)[:2] == said(warm.ask(QUESTION, rerank=slow, method=Reuse(), **SHORT))[:2]
    others.pop().close()
    assert nothing_is_left(warm)


def test_where_others_are_answered_kv_are_fetched_and_no_prompt_is_begun(model, tmp_path):
    with open_rag(tmp_path, model=model) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
    with open_rag(tmp_path, model=model) as rag:
        other = rag.engine.stream(["Another passage."], "What?", max_new_tokens=8, min_new_tokens=8)
        next(other)
        rag.retriever._second_s, before = 1.0, forwards(rag)
        prefetch, where = rag.engine.store.prefetch, []
        rag.engine.store.prefetch = lambda *args: prefetch(*args).result(30)

        def then():
            assert forwards(rag) == before
            where.extend(rag.engine.store.where(rag.engine.documents.keys(rag.chunks(hits))).values())

        hits = rag.retrieve(QUESTION, 3)
        answer = rag.ask(QUESTION, top_k=3, rerank=reranker(rag, then=then), **SHORT)
        assert set(where) == {"cpu"}
        assert answer.report.fusion.speculated == "" and answer.report.fusion.hits == {"disk": 3}
        other.close()
        assert nothing_is_left(rag)


def test_errors_of_the_reranker(warm):
    def breaks():
        raise OSError("no network")

    for rerank, error in ((reranker(warm, then=breaks), OSError), (lambda *_: "nonsense", RetrievalError)):
        for ask in (warm.ask, warm.stream):
            warm.retriever._second_s = 1.0
            with pytest.raises(error):
                ask(QUESTION, rerank=rerank, **SHORT)
            assert nothing_is_left(warm)
    assert warm.ask(QUESTION, rerank=reranker(warm), **SHORT).report.fusion.speculated == "used"


def test_errors_of_what_was_begun(warm):
    @dataclass(frozen=True)
    class Fails(Method):
        def select(self, view):
            assert not in_background()
            return Reuse().select(view)

    answer = warm.ask(QUESTION, rerank=reranker(warm), method=Fails(), **SHORT)
    assert answer.report.fusion.speculated == "dropped"
    assert answer.token_ids == warm.ask(QUESTION, rerank=slow, **SHORT).token_ids and nothing_is_left(warm)


def test_a_question_that_is_cancelled(warm):
    stop = Stop()
    with pytest.raises(RagKVError, match="stopped before it began"):
        warm.ask(QUESTION, rerank=reranker(warm, then=stop.set), stopping_criteria=[stop], **SHORT)
    assert nothing_is_left(warm)

    async def cancelled():
        asked = asyncio.ensure_future(warm.aask(QUESTION, rerank=reranker(warm, then=begun.set), **SHORT))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    begun = threading.Event()
    asyncio.run(cancelled())
    warm.threads.close()
    assert nothing_is_left(warm)


def test_a_stream_that_nobody_reads(warm, held):
    for end in ("close", "drop"):
        _, pieces = warm.stream(QUESTION, rerank=reranker(warm), **SHORT)
        kept = ahead(warm)._latest()
        assert not kept.over
        assert warm.ask(QUESTION, rerank=reranker(warm), **SHORT).report.fusion.speculated == "", "one at a time"
        del kept
        if end == "close":
            pieces.close()
        else:
            del pieces
        assert nothing_is_left(warm)
        assert warm.ask(QUESTION, rerank=reranker(warm), **SHORT).report.fusion.speculated == "used"

    def rerank(question, texts):
        assert Held.begun.wait(30)
        return [-number for number in range(len(texts))]

    _, pieces = warm.stream(QUESTION, rerank=rerank, method=held, **SHORT)
    pieces.close()
    del pieces
    before = forwards(warm)
    Held.go.set()
    assert nothing_is_left(warm) and forwards(warm) == before, "it ends where nobody can ask for it any more"


def test_a_model_that_changes_before_the_first_piece(model):
    with open_rag(model=small_model()) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        rag.retriever._second_s = 1.0
        _, pieces = rag.stream(QUESTION, rerank=reranker(rag), **SHORT)
        assert not ahead(rag)._latest().over
        rag.engine.model.load_state_dict(small_model(seed=1).state_dict())
        assert "".join(pieces) == rag.ask(QUESTION, rerank=slow, **SHORT).text
        assert pieces.report.fusion.speculated == "dropped" and nothing_is_left(rag)


def test_lost_kv_are_read_again_meanwhile(warm):
    told, chunks = [], warm.chunks(warm.retrieve(QUESTION, 3))
    warm.engine.store.remove_many(warm.engine.documents.keys(chunks))
    seen = []
    rerank = reranker(warm, then=lambda: seen.append(warm.engine.documents.missing(chunks)))
    answer = warm.ask(QUESTION, top_k=3, rerank=rerank, progress=told.append, **SHORT)
    assert seen == [[]] and answer.report.fusion.speculated == "used"
    assert answer.report.fusion.sources == ["computed"] * 3 and {each.reason for each in told} == {"missing"}


def test_it_stops_where_lists_never_stay(warm):
    outcomes = [warm.ask(QUESTION, rerank=reranker(warm, TURNS), **SHORT).report.fusion.speculated for _ in range(8)]
    assert outcomes == ["dropped"] * 5 + [""] * 3
    outcomes = [warm.ask(QUESTION, rerank=reranker(warm), **SHORT).report.fusion.speculated for _ in range(3)]
    assert outcomes == ["", "used", "used"], "it was seen that they stay"


def test_it_is_off_where_there_is_nothing_to_wait_for(warm):
    quick = lambda question, texts: [-number for number in range(len(texts))]  # noqa: E731
    warm.retriever._second_s = 0.0
    for options in ({"rerank": quick}, {"rerank": quick}, {}, {"rerank": slow, "hops": 2}):
        assert warm.ask(QUESTION, **options, **SHORT).report.fusion.speculated == ""
    assert ahead(warm)._latest is None


@pytest.mark.parametrize(
    "engine", [{"scheduler": Scheduler(at_once=1)}, {"gate": Gate(share=1.0)}], ids=["one at a time", "gate"]
)
def test_with(model, engine):
    with open_rag(model=model, **engine) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        rag.ask(QUESTION, rerank=slow, **SHORT)
        assert rag.ask(QUESTION, rerank=reranker(rag), **SHORT).report.fusion.speculated == "used"
        assert rag.engine.stats().line.namespaces[""].done == 2


def test_there_must_be_room(model):
    with open_rag(model=model, scheduler=Scheduler(memory_bytes=1)) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        rag.retriever._second_s = 1.0
        with pytest.raises(RagKVError, match="memory_bytes"):
            rag.ask(QUESTION, rerank=reranker(rag), **SHORT)
        assert nothing_is_left(rag)


def test_a_fork_makes_its_own(warm, held, forked):
    def rerank(question, texts):
        assert Held.begun.wait(30)
        time.sleep(0.002)
        return [-number for number in range(len(texts))]

    want = warm.ask(QUESTION, rerank=slow, **SHORT).text
    _, pieces = warm.stream(QUESTION, rerank=rerank, method=held, **SHORT)

    def child():
        Held.go.set()
        assert "".join(pieces) == want and pieces.report.fusion.speculated == "dropped"
        return warm.ask(QUESTION, rerank=reranker(warm), **SHORT).report.fusion.speculated

    assert forked(child) == "used", "what the parent has begun is in nobody's way"
    Held.go.set()
    assert "".join(pieces) == want and pieces.report.fusion.speculated == "used"


def test_closed_while_one_is_begun(model, held):
    rag = open_rag(model=model)
    rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
    rag.retriever._second_s = 1.0
    _, pieces = rag.stream(
        QUESTION, method=held, rerank=lambda _, t: Held.begun.wait(30) and [-n for n in range(len(t))]
    )
    threading.Timer(0.05, Held.go.set).start()
    rag.close()
    with pytest.raises(RagKVError, match="closed"):
        next(pieces)


def test_a_prompt_in_another_order_is_not_taken(warm, monkeypatch):
    """By what was computed before, passages may come in another order in the end than they were begun in."""
    read, options = Finder.read, {"top_k": 3, "order": "cache", **SHORT}
    plain = warm.ask(QUESTION, rerank=reranker(warm), **options)

    def turned(self, hits, *more):
        found = read(self, hits, *more)
        return Found(found.hits[::-1], found.chunks[::-1], found.left_out) if in_background() else found

    monkeypatch.setattr(Finder, "read", turned)
    answer = warm.ask(QUESTION, rerank=reranker(warm), **options)
    assert answer.report.fusion.speculated == "dropped"
    assert (answer.token_ids, answer.sources) == (plain.token_ids, plain.sources)
    assert nothing_is_left(warm)
