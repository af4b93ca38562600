"""What was computed is used wherever a prompt begins the same: exact where it says so, and never anywhere else."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import pytest
from transformers import PreTrainedTokenizerFast

from ragkv import (
    ArgumentTypeError,
    CacheBlend,
    Engine,
    FullPrefill,
    LegoLink,
    Method,
    PromptTemplate,
    QuestionAware,
    Reuse,
    Selection,
    SensitiveTokens,
    TieredStore,
)
from ragkv.bundled import MODEL_PATH
from ragkv.fusion.layout import lay_out
from ragkv.fusion.placement import Placement
from ragkv.library.pieces import BLOCK_TOKENS, pieces
from ragkv.testing import ARCHITECTURES, random_ids, tiny_model

from .conftest import full

EXACT = 1e-4
TEMPLATE = PromptTemplate(prefix=[1, 5, 6, 7], before_chunk=[9], after_chunk=[10], after_question=[12])
WORDS = PromptTemplate(
    prefix="Read.\n", after_chunk="\n", before_question="Q:", after_question="\nA:", after_answer="\n"
)
MEMORY = 64 << 20


def engine_of(architecture="llama", **options):
    return Engine(tiny_model(architecture), template=TEMPLATE, **{"paths": MEMORY, **options})


def asked(engine, chunks, question=None, **options):
    """A prompt, once all that it computed is stored."""
    prompt = engine.fuse(chunks, random_ids(9) if question is None else question, **options)
    assert engine.paths.wait(30)
    return prompt


def far(engine, prompt):
    return float((prompt.logits - full(engine.model, prompt.input_ids)).abs().max())


def apart(one, other):
    """How far two prompts' keys and values, and their logits, are from each other."""
    pairs = [(one.logits, other.logits)]
    for a, b in zip(one.past_key_values.layers, other.past_key_values.layers, strict=True):
        pairs += [(a.keys, b.keys), (a.values, b.values)]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.fixture(scope="module")
def words():
    return PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)


@pytest.fixture
def read():
    """An engine that keeps what it computes, and passages: one alone, a document of two, another one alone."""
    engine = engine_of(method=FullPrefill(), sensitivity=True)
    document = engine.add_document([random_ids(n) for n in (13, 22)])
    first, last = engine.add([random_ids(17), random_ids(30)])
    yield engine, [first, *document, last]
    engine.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_begins_the_same_is_computed_once_and_exact(architecture):
    engine = engine_of(architecture)
    document = engine.add_document([random_ids(n) for n in (13, 22)])
    a, b, c = engine.add([random_ids(n) for n in (17, 40, 25)])
    first = asked(engine, [a, document[1], b, c], method=FullPrefill())
    assert first.report.sources == ["cpu", "unused", "unused", "unused"]  # the first one is exact in place
    assert first.report.saved_tokens == len(a)
    assert 0 < first.report.milliseconds["keep"] < first.report.milliseconds["total"]
    again = asked(engine, [a, document[1], b, c], random_ids(8), method=FullPrefill())
    assert again.report.sources == ["cpu", "path", "path", "path"] and again.report.budget == 0
    other = asked(engine, [a, document[1], c, b], method=FullPrefill())
    assert other.report.sources == ["cpu", "path", "unused", "unused"]
    assert other.report.saved_tokens == len(a) + len(document[1])
    assert max(far(engine, prompt) for prompt in (first, again, other)) < EXACT


@pytest.mark.parametrize("method", [Reuse(), SensitiveTokens(0.3), CacheBlend(0.5), QuestionAware(0.5), "auto"])
def test_what_is_exact_under_its_path_is_so_for_every_method(read, method):
    engine, chunks = read
    asked(engine, chunks)
    prompt = asked(engine, chunks, random_ids(8), method=method)
    assert prompt.report.sources == ["cpu", "path", "path", "path"] and prompt.report.budget == 0
    assert far(engine, prompt) < EXACT
    longer = asked(engine, [*chunks, random_ids(20)], method="cache-blend:ratio=1.0")
    assert longer.report.sources[:4] == prompt.report.sources and far(engine, longer) < EXACT


@pytest.mark.parametrize("method", [LegoLink(8), SensitiveTokens(0.2)])
def test_what_a_method_repaired_is_taken_from_there(method):
    engine = engine_of(method=method)
    document = engine.add_document([random_ids(n) for n in (13, 22)])
    chunks = [*engine.add([random_ids(17)]), *document, *engine.add([random_ids(30)])]
    question = random_ids(9)
    first, again = asked(engine, chunks, question), asked(engine, chunks, question)
    assert apart(first, again) < EXACT
    assert again.report.budget == 0 < first.report.budget
    assert again.report.saved_tokens == first.report.tokens["recomputed"] + first.report.saved_tokens
    assert again.report.sources == ["cpu", *["variant"] * 3]
    assert "variant" not in asked(engine, chunks, method=LegoLink(9)).report.sources  # another method's
    assert "variant" not in asked(engine, chunks[1:]).report.sources  # another path
    exact = asked(engine, chunks, method=FullPrefill())
    assert far(engine, exact) < EXACT and exact.report.tokens["recomputed"] == sum(map(len, chunks[1:]))
    assert asked(engine, chunks).report.sources == ["cpu", *["path"] * 3]  # what is exact goes first


def test_what_a_longer_prompt_asks_for_besides_is_computed_and_kept_too():
    engine = engine_of(method=SensitiveTokens(0.2))
    texts = [random_ids(n) for n in (17, 30, 25, 40)]
    chunks = engine.add(texts)
    counts = [asked(engine, chunks[:many]).report.tokens["recomputed"] for many in (2, 4, 2, 4)]
    plain = Engine(engine.model, template=TEMPLATE, method=SensitiveTokens(0.2))
    whole = plain.fuse(plain.add(texts), random_ids(9)).report
    assert counts[0] > 0 and 0 < counts[1] < whole.tokens["recomputed"] and counts[2:] == [0, 0]
    assert asked(engine, chunks).report.saved_tokens == whole.tokens["recomputed"]


class Quiet(Method):
    """A method that does not say what it is, and looks at nothing."""

    looks = False

    def __init__(self, tokens):
        self.tokens = tokens

    def select(self, view):
        return view.layout.reusable[-self.tokens :]


def test_a_method_without_a_name_of_its_own_keeps_nothing():
    engine = engine_of()
    chunks = engine.add([random_ids(17), random_ids(30)])
    assert asked(engine, chunks, method=Quiet(9)).report.tokens["recomputed"] == 9
    assert asked(engine, chunks, method=Quiet(5)).report.tokens["recomputed"] == 5
    assert len(engine.paths.store) == 0


def test_layer_by_layer_as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr("ragkv.fusing.Placement", partial(Placement, by_layer=True))
    for method, source in ((FullPrefill(), "path"), (LegoLink(8), "variant")):
        engine = engine_of(method=method)
        chunks, question = engine.add([random_ids(n) for n in (17, 30, 25)]), random_ids(9)
        first, again = asked(engine, chunks, question), asked(engine, chunks, question)
        assert again.report.sources == ["cpu", source, source] and apart(first, again) < EXACT
        both = engine.fuse_many([(chunks, question), (chunks[::-1], question)])
        assert apart(both[0], first) < EXACT and both[0].report.sources == again.report.sources


@pytest.mark.parametrize("method", [CacheBlend(0.5), QuestionAware(0.5, sees=0.5)])
def test_tokens_that_did_not_see_all_in_all_layers_are_not_kept(read, method):
    engine, chunks = read
    asked(engine, chunks, method=method)
    again = asked(engine, chunks, method=method)
    assert again.report.budget > 0 and not {"path", "variant"} & set(again.report.sources)
    assert len(engine.paths.store) == 0


def test_what_was_computed_for_one_question_serves_others():
    engine, method = engine_of(), QuestionAware(0.2)
    chunks = engine.add([random_ids(n) for n in (17, 30, 25, 40)])
    questions = [random_ids(9, seed) for seed in range(6)]
    first = [asked(engine, chunks, question, method=method).report for question in questions]
    assert first[0].saved_tokens == 0 < first[1].saved_tokens
    counts = [one.tokens["recomputed"] for one in first]
    assert counts[0] > counts[-1] and all(count < counts[0] for count in counts[1:])
    # Each question finds all that was computed so far, not what the last one had computed.
    again = [asked(engine, chunks, question, method=method).report.tokens["recomputed"] for question in questions]
    assert sum(again) < sum(counts[1:])


def test_a_chunk_computed_behind_what_is_not_exact_is_not_taken_for_exact(read):
    engine, chunks = read
    asked(engine, chunks, method=LegoLink(13))  # the document's first part whole, of what is in front only a part
    prompt = asked(engine, chunks, method=FullPrefill())
    assert "path" not in prompt.report.sources[2:] and far(engine, prompt) < EXACT


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox"])
def test_earlier_messages_are_computed_once_and_exact(architecture, words):
    engine = Engine(tiny_model(architecture, vocab_size=1792), words, template=WORDS, paths=MEMORY)
    passage, text, reused = engine.add(["The company sells maps."]), "a word and another one, " * 9, []
    said = [{"role": role, "content": text + str(n)} for n, role in enumerate(("user", "assistant") * 2)]
    for turns in (2, 2, 4, 4):
        prompt = asked(engine, passage, [*said[:turns], {"role": "user", "content": "And now?"}])
        reused.append(prompt.report.reused_tokens)
        assert far(engine, asked(engine, [], [*said[:turns], {"role": "user", "content": "Why?"}])) < EXACT
    assert reused[0] < reused[1] <= reused[2] < reused[3] and reused[3] >= reused[1] + BLOCK_TOKENS
    assert prompt.report.prefix_tokens - reused[3] < BLOCK_TOKENS
    whole = asked(engine, [random_ids(9)], [*said, {"role": "user", "content": "And now?"}], method=FullPrefill())
    assert whole.report.reused_tokens == reused[3] and far(engine, whole) < EXACT
    changed = [{**said[0], "content": "Other words, " + text}, *said[1:], {"role": "user", "content": "And now?"}]
    assert asked(engine, passage, changed).report.reused_tokens == reused[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda chunks: [chunks[0], chunks[3], *chunks[1:3]],
        lambda chunks: [*chunks[1:]],
        lambda chunks: [chunks[0], random_ids(14)[1:], *chunks[2:]],
        lambda chunks: [chunks[0], *chunks[2:]],
    ],
    ids=["swapped", "begun later", "edited", "without one"],
)
def test_another_path_finds_nothing_behind_the_change(read, change):
    engine, chunks = read
    asked(engine, chunks)
    prompt = asked(engine, change(chunks))
    assert "path" not in prompt.report.sources and far(engine, prompt) < EXACT


def test_namespaces_models_and_openings_have_paths_of_their_own():
    texts = [random_ids(n) for n in (17, 30, 25)]
    engine = engine_of(method=FullPrefill())
    asked(engine, engine.add(texts))
    assert asked(engine, texts).report.sources == ["cpu", "path", "path"]
    assert "path" not in asked(engine, texts, namespace="other").report.sources
    assert asked(engine, texts, namespace="other").report.sources == ["cpu", "path", "path"]
    opening = PromptTemplate(prefix=[1, 5, 6, 8], before_chunk=[9], after_chunk=[10], after_question=[12])
    for other in (Engine(engine.model, template=opening), Engine(tiny_model(rope_theta=5e4), template=TEMPLATE)):
        other.documents.paths = engine.paths
        prompt = asked(other, texts, method=FullPrefill())
        assert "path" not in prompt.report.sources and far(other, prompt) < EXACT


def test_chunks_that_stand_apart_neither_find_paths_nor_leave_any():
    engine = engine_of(method=FullPrefill())
    chunks = engine.add([random_ids(n) for n in (17, 30)])
    asked(engine, chunks)
    kept, question, starts = len(engine.paths.store), random_ids(9), (4, 40)
    prompt = asked(engine, chunks, question, starts=starts)
    plain = Engine(engine.model, template=TEMPLATE, method=FullPrefill()).fuse(chunks, question, starts=starts)
    assert "path" not in prompt.report.sources and apart(prompt, plain) < EXACT
    assert len(engine.paths.store) == kept == 1


@dataclass(frozen=True)
class Chosen(Method):
    """All tokens; from some layer on fewer, or without sight of other chunks."""

    checks: tuple[int, ...] = ()
    blind: bool = False

    def select(self, view):
        tokens = view.layout.reusable
        return Selection(tokens, tokens[:0] if self.blind else None, self.checks)

    def narrow(self, check):
        return check.tokens[::2]


@pytest.mark.parametrize("method", [Chosen(blind=True), Chosen(checks=(2,))], ids=["blind", "narrowing"])
def test_what_was_computed_with_less_is_not_kept(method):
    engine = engine_of()
    chunks = engine.add([random_ids(n) for n in (17, 30, 25)])
    asked(engine, chunks, method=method)
    assert "variant" not in asked(engine, chunks, method=method).report.sources
    prompt = asked(engine, chunks, method=FullPrefill())
    assert "path" not in prompt.report.sources and far(engine, prompt) < EXACT


def test_a_folder_that_is_only_read_is_not_written_to(tmp_path, caplog):
    model, texts = tiny_model(), [random_ids(n) for n in (17, 30)]

    def opened(**options):
        store = TieredStore(tmp_path, **options)
        return Engine(model, template=TEMPLATE, method=FullPrefill(), store=store, paths=True)

    with opened() as engine:
        asked(engine, engine.add(texts))
    with opened(readonly=True) as engine:
        assert asked(engine, texts).report.sources[1:] == ["path"]
        assert far(engine, asked(engine, texts[::-1])) < EXACT
    assert not caplog.records


def test_what_is_removed_leaves_nothing_that_was_computed_of_it_or_behind_it(read):
    engine, chunks = read
    store = engine.paths.store
    asked(engine, chunks)
    asked(engine, [chunks[3], chunks[0]])
    assert len(store) == 4
    engine.forget(chunks[1:3])
    assert len(store) == 1  # that of the other prompt
    prompt = asked(engine, chunks)  # computed, and not kept: its document is gone
    assert far(engine, prompt) < EXACT and len(store) == 1


@pytest.mark.parametrize("apart", [True, False], ids=["another-store", "one-store"])
def test_forgetting_that_is_cut_short_leaves_nothing_behind_chunks_that_are_gone(monkeypatch, apart):
    """Whatever call of a store is the last one before the process is killed."""
    for last in range(5):
        store = TieredStore()
        engine = engine_of(store=store, paths=MEMORY if apart else True, method=FullPrefill())
        chunks = engine.add_document([random_ids(n) for n in (17, 30, 25)])
        asked(engine, [chunks[1], chunks[0]])
        calls, remove = [], TieredStore.remove_many

        def removes(*args, calls=calls, last=last, remove=remove, **more):
            if len(calls) == last:
                raise KeyboardInterrupt
            calls.append(remove(*args, **more))
            return calls[-1]

        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(TieredStore, "remove_many", removes)
            engine.forget(chunks)
        computed = engine.paths.store.computed_of([engine.documents.key(chunk) for chunk in chunks])
        assert not computed or not engine.documents.missing(chunks)
        asked(engine, [chunks[2], chunks[1]])  # of a document that is being forgotten nothing is stored any more
        engine.forget(chunks)
        assert len(store) == len(engine.paths.store) == 0
    assert len(calls) < last


def test_paths_on_disk_outlive_the_process_and_are_removed_by_another(tmp_path):
    model, ids = tiny_model(), [random_ids(n) for n in (17, 30, 25)]

    def opened():
        return Engine(
            model,
            template=TEMPLATE,
            method=FullPrefill(),
            store=TieredStore(tmp_path / "kv"),
            paths=TieredStore(tmp_path / "paths"),
        )

    with opened() as engine:
        asked(engine, engine.add(ids))
    with opened() as engine:
        prompt = asked(engine, engine.add(ids))
        assert prompt.report.sources == ["disk", "path", "path"] and far(engine, prompt) < EXACT
        assert len(engine.paths.store) == 2
        engine.forget(engine.add(ids)[2:])
        assert len(engine.paths.store) == 1
        engine.forget(engine.add(ids)[:1])
        assert len(engine.paths.store) == 0


def test_evicted_pieces_and_a_store_that_is_too_small_cost_time_alone(read):
    engine, chunks = read
    asked(engine, chunks)
    store = engine.paths.store
    assert store.remove(_whole(engine, chunks)[1])
    prompt = asked(engine, chunks)
    assert prompt.report.sources == ["cpu", "unused", "path", "path"] and far(engine, prompt) < EXACT
    small = engine_of(paths=2000, method=FullPrefill())
    assert far(small, asked(small, [chunk.ids for chunk in chunks])) < EXACT
    assert len(small.paths.store) == 0


def _whole(engine, chunks):
    """The keys of a prompt's chunks under their paths."""
    documents = engine.documents
    layout = lay_out(TEMPLATE.prefix, documents.anchor, chunks, (3,), documents.reader.decoder.device)
    return [piece.whole for piece in pieces(documents, documents.reader, layout, FullPrefill())[1]]


@pytest.mark.parametrize("codec", ["int8", "fp8", "lossless"])
def test_codecs_of_paths(codec):
    engine = engine_of(method=LegoLink(8), paths=TieredStore(codec=codec))
    chunks, question = engine.add([random_ids(n) for n in (17, 30, 25)]), random_ids(9)
    first, again = asked(engine, chunks, question), asked(engine, chunks, question)
    assert again.report.sources == ["cpu", "variant", "variant"]
    assert apart(first, again) < (EXACT if codec == "lossless" else 0.5)


def test_a_session_goes_on_behind_a_prompt_that_took_from_paths(read):
    engine, chunks = read
    asked(engine, chunks)
    options = {"max_new_tokens": 4, "eos_token_id": None}
    answer = engine.generate(chunks, random_ids(8), keep_past=True, **options)
    second = engine.generate([random_ids(12)], random_ids(7), past=answer.past, **options)
    assert answer.report.fusion.sources == ["cpu", "path", "path", "path"]
    assert second.report.fusion.sources == ["unused"]


@pytest.mark.parametrize("paths", ["a lot", 2.5, None])
def test_paths_are_a_store_or_bytes(paths):
    with pytest.raises(ArgumentTypeError, match="paths"):
        engine_of(paths=paths)


def test_paths_beside_chunks_go_with_them_also_where_none_are_kept(tmp_path):
    model, ids = tiny_model(), [random_ids(n) for n in (17, 30, 25)]

    def opened(**options):
        return Engine(model, template=TEMPLATE, method=FullPrefill(), store=TieredStore(tmp_path), **options)

    with opened(paths=True) as engine:
        chunks = engine.add(ids)
        asked(engine, chunks)
        assert asked(engine, chunks).report.sources == ["cpu", "path", "path"]
        assert len(engine.store) == len(chunks) + 2
        engine.forget(chunks[2:])
        assert len(engine.store) == 3
    with opened() as engine:
        assert engine.paths is None
        engine.forget(engine.add(ids)[:1])
        assert len(engine.store) == 2  # the other two chunks
