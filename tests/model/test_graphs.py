"""Fixed shapes: the same prompts and answers as without, on every architecture; what happens about the graphs themselves."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from weakref import ref

import pytest
import torch

from ragkv import (
    ArgumentTypeError,
    CacheBlend,
    Engine,
    LegoLink,
    PromptTemplate,
    QuestionAware,
    RelevantTokens,
    Reuse,
    TieredStore,
    UnsupportedModelError,
)
from ragkv.fusion.placement import Placement
from ragkv.model import graphs as module
from ragkv.model.graphs import Graphs, _Fixed
from ragkv.model.kernel_attention import Scores, SpanBuilder
from ragkv.model.rows import Rows
from ragkv.testing import ARCHITECTURES, random_ids, shows_attention, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6, 7], after_chunk=[10])
CLOSED = [name for name in ARCHITECTURES if not shows_attention(name)]
PASSAGES, QUESTION = [random_ids(n) for n in (30, 17, 41)], random_ids(6)
NO_END = {"max_new_tokens": 9, "eos_token_id": None}


class Recorder:
    """Stands for CUDA's graphs: what is replayed writes to the memory that the capture found."""

    def __init__(self, error=None, usable=True, free=1 << 40):
        self.captured, self.replayed, self.settled = 0, 0, 0
        self.error, self.on, self.free = error, usable, free

    def __call__(self, body):
        if self.error is not None:
            raise self.error
        self.captured += 1
        with torch.inference_mode(False):  # a graph writes whatever it is
            out = torch.empty_like(body(lambda layer: None))

        def replay(between):
            self.replayed += 1
            return out.copy_(body(between))

        return replay

    def usable(self):
        return self.on

    def settle(self):
        self.settled += 1

    def free_bytes(self):
        return self.free


def engine(model, graphs, capture=None, **options):
    made = Engine(model, template=TEMPLATE, kernels="reference", graphs=graphs, **{"method": LegoLink(3), **options})
    if capture is not None:
        made.documents.steps.graphs._capture = capture
    return made


def fused(engine, method=None, question=QUESTION):
    return engine.fuse(engine.add(PASSAGES)[::-1], question, method=method)


def said(engine, **options):
    return engine.generate(engine.add(PASSAGES)[::-1], QUESTION, **{**NO_END, **options})


close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


def same(got, want):
    close(got.logits, want.logits)
    for a, b in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        close(a.keys, b.keys)
        close(a.values, b.values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fixed_shapes_change_nothing(architecture):
    model = tiny_model(architecture)
    if architecture in CLOSED:
        with pytest.raises(UnsupportedModelError, match="graphs=True was asked for"):
            Engine(model, template=TEMPLATE, graphs=True)
        return
    plain = engine(model, False, piece_tokens=16)
    fixed = engine(model, True, piece_tokens=16, store=plain.store)
    loaded = model.config._attn_implementation
    for method in (CacheBlend(0.3), Reuse()):
        want, got = (fused(each, method) for each in (plain, fixed))
        assert (want.report.ran, got.report.ran, got.report.attention) == ("eager", "fixed", "selective (reference)")
        same(got, want)
    want, got = (said(each, prompt_lookup_num_tokens=3) for each in (plain, fixed))
    assert (want.report.fusion.ran, got.report.fusion.ran, got.report.ran) == ("eager", "fixed", "fixed")
    assert got.token_ids == want.token_ids
    assert model.config._attn_implementation == loaded


def test_looks_are_fixed_too():
    """What the question attends to is of the rows that there are alone, and not the next run's."""
    model, ran = tiny_model("gpt_oss"), []
    plain, made = engine(model, False), engine(model, True, Recorder())
    graphs = made.documents.steps.graphs
    forward = graphs.forward
    graphs.forward = lambda rows: (forward(rows), ran.append((rows.ran, rows.scores is not None)))[0]
    for method in (QuestionAware(0.3), RelevantTokens(0.2)):
        for question in (QUESTION, random_ids(5), random_ids(4)):  # two of them fill up the same step
            want, got = (fused(each, method, question) for each in (plain, made))
            assert got.report.looked == want.report.looked == "scored (reference)"
            assert torch.equal(got.recomputed, want.recomputed)
            same(got, want)
    assert [how for how, watched in ran if watched] == ["fixed", "graph", "fixed", "graph", "graph", "graph"]


def test_rows_that_fill_up_count_nothing():
    """Not even where those of the run before counted."""
    steps = engine(tiny_model(), True, Recorder()).documents.steps
    decoder, ids = steps.decoder, steps.decoder.random_ids(40)
    for count in (8, 6, 5, 6):
        found = []
        for forward in (steps.graphs.forward, decoder.forward):
            cache, at = decoder.cache(40), torch.arange(30, 30 + count)
            decoder.read(ids[:30], cache, 0)
            scores = Scores(torch.arange(1.0, count + 1))
            rows = Rows(ids[at], at, cache, SpanBuilder(decoder.spans, at, 30 + count), wanted=0, scores=scores)
            forward(rows)
            found.append((rows.ran, scores.last(len(decoder.layers))))
        assert [ran for ran, _ in found] in (["fixed", "eager"], ["graph", "eager"])
        close(found[0][1], found[1][1])


@pytest.mark.parametrize("tier", [{}, {"gpu_bytes": 1 << 20, "device": "cpu"}], ids=["cpu", "gpu"])
def test_what_is_placed_layer_by_layer_is_there_when_a_graph_runs(tier, monkeypatch):
    """As on an accelerator; a graph asks for nothing, and the cache's memory is another once it is in a room."""
    model = tiny_model("qwen3", num_hidden_layers=5)
    monkeypatch.setattr("ragkv.fusing.Placement", partial(Placement, by_layer=True))
    with engine(model, False) as plain, engine(model, True, Recorder(), store=TieredStore(**tier)) as one:
        chunks, seen = one.add(PASSAGES), set[str]()
        for method in (Reuse(), LegoLink(3), RelevantTokens(ratio=0.2)) * 3:
            got = one.fuse(chunks[::-1], QUESTION, method=method)
            same(got, fused(plain, method))
            seen |= {got.report.ran, *got.report.sources}
    assert seen > {"graph", "fixed"} and len(seen) <= 4 and "eager" not in seen


def test_layers_are_placed_while_others_compute(monkeypatch):
    """A few layers at a time are replayed, and those behind them come meanwhile; what cannot be placed is no graph's fault."""
    log, place = [], Placement._place_layer
    model = tiny_model(num_hidden_layers=5)
    monkeypatch.setattr("ragkv.fusing.Placement", partial(Placement, by_layer=True))
    monkeypatch.setattr(Placement, "_place_layer", lambda self, layer: log.append(layer) or place(self, layer))
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_hook(lambda *_, number=number: log.append(f"computed {number}"))
    monkeypatch.setattr(Graphs, "_hindrance", lambda self: "")  # these hooks are the test's
    with engine(model, False) as plain, engine(model, True, Recorder()) as made:
        want = fused(plain)
        made.add(PASSAGES)
        for ran, split in (("fixed", False), ("graph", False), ("graph", True), ("graph", True)):
            log.clear()
            got = fused(made)
            same(got, want)
            assert got.report.ran == ran
            first = log.index("computed 0")
            assert [one for one in log[:first] if isinstance(one, int)] == ([0, 1] if split else [0, 1, 2, 3, 4])
        assert log == [0, 1, "computed 0", "computed 1", 2, 3, "computed 2", "computed 3", 4, "computed 4"]
        for fill, ran in ((_Fixed._fill, "graph"), (lambda *_: int("filled"), "eager: .*filled")):
            monkeypatch.setattr(
                Placement, "_place_layer", lambda self, layer: int("damaged") if layer == 3 else place(self, layer)
            )
            with pytest.raises(ValueError, match="damaged"):
                fused(made)
            monkeypatch.setattr(Placement, "_place_layer", place)
            monkeypatch.setattr(_Fixed, "_fill", fill)
            same(got := fused(made), want)
            assert re.match(ran, got.report.ran)  # behind what could not be placed a step's own failure is seen as such


def test_masks_are_no_fixed_shapes():
    with pytest.raises(UnsupportedModelError, match="give kernels='reference'"):
        Engine(tiny_model(), template=TEMPLATE, graphs=True)
    with pytest.raises(ArgumentTypeError, match="graphs"):
        Engine(tiny_model(), template=TEMPLATE, graphs="on")
    assert Engine(tiny_model(), template=TEMPLATE).documents.steps.graphs is None


def test_a_second_use_is_captured_and_then_replayed():
    model, capture = tiny_model(), Recorder()
    want, made = said(engine(model, False), do_sample=False), engine(model, True, capture)
    assert said(made).report.ran == "graph"  # the first token's step as it is, the second one's captured
    assert (capture.captured, capture.replayed) == (1, NO_END["max_new_tokens"] - 2)
    answer = said(made)
    assert (answer.report.fusion.ran, answer.report.ran) == ("graph", "graph")
    assert answer.token_ids == want.token_ids
    assert capture.captured == 2
    fused(made)
    assert capture.captured == 2


def test_logits_are_not_those_of_the_next_replay():
    made = engine(tiny_model(), True, Recorder())
    fused(made), fused(made)
    first = fused(made)
    kept = first.logits.clone()
    assert first.report.ran == "graph"
    other = fused(made, question=random_ids(6, seed=99))
    assert torch.equal(first.logits, kept) and not torch.equal(other.logits, kept)


@pytest.mark.parametrize("capture", [Recorder(RuntimeError("operation not permitted\nwhen")), None])
def test_what_cannot_be_captured_runs_as_before(capture, monkeypatch):
    """A capture that fails, and a model that waits for the device: eager from then on, and the report says why."""
    model, why = tiny_model(), "its graph could not be captured: operation not permitted"
    want, made = said(engine(model, False)), engine(model, True, capture)
    if capture is None:
        plain, why = model.model.layers[1].mlp.forward, "the model waits for the device (_local_scalar_dense)"

        def waiting(hidden):
            return plain(hidden) if hidden.sum().item() else hidden

        monkeypatch.setattr(model.model.layers[1].mlp, "forward", waiting)
    said(made)
    answer = said(made)
    assert answer.token_ids == want.token_ids
    assert (answer.report.fusion.ran, answer.report.ran) == (f"eager: {why}",) * 2
    assert not made.documents.steps.graphs._rooms._rooms and not made.documents.steps.graphs._fixed


def test_other_failures_are_raised(monkeypatch):
    made = engine(tiny_model(), True, Recorder())
    chunks = made.add(PASSAGES)

    def fails(hidden):
        raise ValueError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(made.model.model.layers[1].mlp, "forward", fails)
        with pytest.raises(ValueError, match="on purpose"):
            made.fuse(chunks, QUESTION)
    assert made.fuse(chunks, QUESTION).report.ran == "fixed"


def test_a_step_that_fails_where_the_model_does_not_runs_as_before(monkeypatch):
    """Whatever goes wrong in fixed shapes alone: the answer is there, and the report says why."""
    model = tiny_model()
    want, made = said(engine(model, False)), engine(model, True, Recorder())
    monkeypatch.setattr(module._Fixed, "_body", lambda self, cut: int("none"))
    answer = said(made)
    assert answer.token_ids == want.token_ids
    assert answer.report.ran.startswith("eager: its step in fixed shapes failed: invalid literal")


def test_what_runs_instead_has_the_memory_of_what_failed(monkeypatch):
    model, held = tiny_model(), []
    made = engine(model, True, Recorder())
    forward = made.documents.steps.decoder.forward

    def full(step, cut):
        computed = torch.ones(1)
        held.append(ref(computed))
        raise torch.OutOfMemoryError

    def freed(rows):
        assert all(one() is None for one in held)
        return forward(rows)

    monkeypatch.setattr(module._Fixed, "_body", full)
    monkeypatch.setattr(made.documents.steps.decoder, "forward", freed)
    assert said(made).report.ran == "eager: there was no memory for graphs" and len(held) == 1


def test_waits_are_seen_in_inference_mode_too(monkeypatch):
    """There operations come whole, and what they do within is not seen."""
    made = engine(tiny_model(), True, Recorder())
    layer = made.model.model.layers[1].mlp
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda hidden: plain(hidden) * len(torch.where(hidden == 0)))
    with torch.inference_mode():
        assert said(made).report.ran == "eager: the model waits for the device (nonzero)"


def test_a_changed_model_is_captured_anew():
    model, capture = tiny_model(), Recorder()
    made = engine(model, True, capture)
    said(made), said(made)
    before, layer = capture.captured, model.model.layers[0].mlp.up_proj
    layer.weight.data = layer.weight.data.clone()  # elsewhere: what was recorded would read the old place
    want = said(engine(model, False))
    assert said(made).token_ids == want.token_ids
    said(made)
    assert capture.captured == before + 2 and capture.settled


def test_hooks_in_the_model_are_called():
    made, calls = engine(tiny_model(), True, Recorder()), []
    said(made), said(made)
    hook = made.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    answer = said(made)
    why = "eager: hooks are in the model, and a graph would not call them"
    assert answer.report.ran == answer.report.fusion.ran == why
    assert len(calls) == NO_END["max_new_tokens"]
    hook.remove()
    assert said(made).report.ran == "graph"


def test_where_no_graph_may_run_it_is_eager():
    made = engine(tiny_model(), True, Recorder(usable=False))
    why = "eager: its thread is on another stream than the default one"
    assert (said(made).report.ran, fused(made).report.ran) == (why, why)


def unwritten(*size, **options):
    """``torch.empty`` whose memory shows where nothing was written."""
    return torch.full(*size, torch.nan, **options) if isinstance(size[0], tuple) else torch.zeros(*size, **options)


def test_what_fails_loses_nothing_of_a_past(monkeypatch):
    """A cache that somebody holds leaves its room with all that it had, also from the middle of a pass."""
    model, said_next = tiny_model(), []
    mlp = model.model.layers[2].mlp
    forward = mlp.forward
    for graphs in (False, True):
        made, first = engine(model, graphs), iter([True, False])  # what stands in front of the chunks, then the rest

        def once(hidden, first=first):
            return forward(hidden) if next(first, False) else int("none")

        chunks = made.add([*PASSAGES, random_ids(23)])
        past = made.generate(chunks[:3], QUESTION, keep_past=True, **NO_END).past
        for fails in (True, False):
            with monkeypatch.context() as patched, pytest.raises(ValueError) if fails else nullcontext():
                if fails:
                    patched.setattr(mlp, "forward", once)
                    patched.setattr(torch, "empty", unwritten)
                answer = made.generate(chunks[3:], random_ids(5), past=past, **NO_END)
        said_next.append((answer.report.fusion.ran, answer.token_ids))
    assert [ran for ran, _ in said_next] == ["eager", "fixed"]
    assert said_next[0][1] == said_next[1][1]


def test_what_has_no_fixed_shape():
    steps = engine(tiny_model(), True).documents.steps
    shown, cache, one = steps.graphs._shown, steps.decoder.cache(9), torch.zeros(1, dtype=torch.long)
    scattered = {"masks": SpanBuilder(steps.decoder.spans, one, 9)}
    with cache.writing(cache.scatter):
        assert shown(Rows(one, one, cache, **scattered)) == (9, 9)
        assert shown(Rows(one, one, cache, **scattered, masses=object())) is None  # nobody would fill them
        assert shown(Rows(one, one, cache, **scattered, limited=True)) is None
    assert shown(Rows(one, one, cache, first=0)) == (0, 1)
    assert shown(Rows(one, one, cache, first=3)) is None  # slots are not positions
    assert shown(Rows(one, one, cache)) is None


@pytest.mark.parametrize("method", [LegoLink(3), CacheBlend(0.3)], ids=["lego-link", "cache-blend"])
def test_no_prompt_is_made_in_a_room_of_another_model(method):
    """Its numbers may be narrower ones, and a forward as it is takes no others than its own."""
    model = tiny_model()

    def change(dtype):
        for parameter in model.parameters():
            parameter.data = parameter.to(dtype)
        made.documents.runner.refresh()

    made = engine(model, True, method=method)
    change(torch.bfloat16)
    fused(made), said(made)
    change(torch.float32)
    same(fused(made), fused(engine(model, False, method=method)))


def test_inference_mode_leaves_no_trace():
    """Rooms are made by whoever is first, and used by all."""
    model = tiny_model()
    want, made = said(engine(model, False)).token_ids, engine(model, True, Recorder())
    for _ in range(2):
        with torch.inference_mode():
            assert said(made).token_ids == want
        assert said(made).token_ids == want
    assert said(made).report.ran == "graph"


def test_graphs_are_few(monkeypatch):
    monkeypatch.setattr(module, "_MOST_GRAPHS", 2)
    made = engine(tiny_model(), True, capture := Recorder())
    for length in (3, 18, 35, 3):
        assert fused(made, question=random_ids(length)).report.ran == "fixed"
    assert len(made.documents.steps.graphs._fixed) == 2 and capture.settled


def test_several_answers_at_once(monkeypatch):
    """More threads than there are rooms: who finds none runs as before."""
    model = tiny_model()
    plain, made = engine(model, False), engine(model, True, Recorder())
    questions = [random_ids(5 + n) for n in range(4)]
    chunks = plain.add(PASSAGES)
    made.add(PASSAGES)
    want = [plain.generate(chunks, question, **NO_END).token_ids for question in questions]
    ready = threading.Barrier(len(questions))

    def ask(question):
        ready.wait()
        return [made.generate(chunks, question, **NO_END).token_ids for _ in range(3)]

    with ThreadPoolExecutor(len(questions)) as pool:
        assert list(pool.map(ask, questions)) == [[ids] * 3 for ids in want]
    assert len(made.documents.steps.graphs._rooms._rooms) <= 2


def test_a_model_in_parts_is_not_captured(monkeypatch):
    made = engine(tiny_model(), True, Recorder())
    monkeypatch.setattr(made.model.model.layers[0], "_hf_hook", object(), raising=False)
    fused(made)
    assert "eager: its weights are on several devices" in fused(made).report.ran


def test_of_is_asked_for_or_on_a_gpu():
    decoder = engine(tiny_model(), False).decoder
    assert Graphs.of(decoder, None, object) is None and Graphs.of(decoder, False, object) is None
    assert Graphs.of(decoder, True, object) is not None
