"""Where paths might be wrong, or left behind: stores that encode, contexts, engines that share, damage, archives."""

from functools import partial

import pytest
from transformers import PreTrainedTokenizerFast

from ragkv import Engine, FullPrefill, Gate, LegoLink, PromptTemplate, Reuse, SensitiveTokens, TieredStore
from ragkv.bundled import MODEL_PATH
from ragkv.errors import RecordError
from ragkv.store import Batch
from ragkv.store.exchange import export, import_records
from ragkv.store.keys import PATH
from ragkv.store.maintenance import repair
from ragkv.testing import random_ids, tiny_model

from .test_paths import EXACT, MEMORY, TEMPLATE, WORDS, apart, asked, engine_of, far

IDS = [random_ids(n) for n in (17, 30, 25)]


@pytest.mark.parametrize("cpu_codec", [None, "int8"])
def test_what_is_stored_with_less_than_its_numbers_is_not_taken_for_exact(tmp_path, cpu_codec):
    store = TieredStore(tmp_path, codec="raw" if cpu_codec else "int4", cpu_codec=cpu_codec)
    engine = engine_of(store=store, method=FullPrefill())
    chunks = engine.add(IDS)
    repaired = asked(engine, chunks, method=LegoLink(100))
    assert repaired.report.sources[0] != "path" and far(engine, repaired) > EXACT
    first, again = asked(engine, chunks), asked(engine, chunks)
    assert again.report.sources == ["path"] * 3
    assert max(far(engine, first), far(engine, again)) < EXACT


def test_a_variant_is_of_chunks_that_were_read_in_the_same_context():
    engine = engine_of(method=LegoLink(8))
    front, before, middle, last = [random_ids(n) for n in (21, 20, 17, 30)]
    of_document = engine.add_document([before, middle])[1]
    front, alone, last = engine.add([front, middle, last])
    asked(engine, [front, of_document, last])
    prompt = asked(engine, [front, alone, last])
    plain = Engine(engine.model, template=TEMPLATE, method=LegoLink(8))
    assert prompt.report.sources == ["cpu", "cpu", "cpu"]
    assert apart(prompt, plain.fuse([front, alone, last], random_ids(9))) < EXACT
    assert asked(engine, [front, of_document, last]).report.sources == ["cpu", "variant", "variant"]


@pytest.mark.parametrize("keeps", [False, True])
def test_engines_that_share_a_store_in_memory_remove_what_the_other_computed(keeps):
    model, store = tiny_model(), TieredStore()
    one = Engine(model, template=TEMPLATE, method=FullPrefill(), store=store, paths=True)
    other = Engine(model, template=TEMPLATE, store=store, paths=keeps)
    chunks = one.add(IDS)
    asked(one, chunks)
    assert len(store) == 5
    other.forget(chunks[1:2])
    assert len(store) == 2  # two chunks, and nothing behind the one that is gone


def test_bytes_that_are_read_of_paths_are_counted(tmp_path):
    def opened():
        stores = {"store": TieredStore(tmp_path / "kv"), "paths": TieredStore(tmp_path / "paths")}
        return Engine(tiny_model(), template=TEMPLATE, method=FullPrefill(), **stores)

    with opened() as engine:
        asked(engine, engine.add(IDS))
    with opened() as engine:
        report = asked(engine, engine.add(IDS)).report
        assert report.sources == ["disk", "path", "path"]
        read = [store.stats().bytes_read for store in (engine.store, engine.paths.store)]
        assert report.bytes_read == sum(read) and min(read) > 0


def test_a_prompt_that_is_exact_under_its_path_is_no_check_of_the_method():
    engine = engine_of(gate=Gate(share=1.0, checks=1))
    chunks = engine.add(IDS)
    asked(engine, chunks, method=FullPrefill())
    assert asked(engine, chunks, method=Reuse()).report.sources == ["cpu", "path", "path"]
    asked(engine, [*chunks, random_ids(9)], method="auto")
    assert engine.gate.wait(20)
    assert [*engine.store.stats().checks] == [repr(SensitiveTokens())]


def test_many_damaged_pieces_cost_time_alone(monkeypatch):
    words = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
    engine = Engine(tiny_model(vocab_size=1792), words, template=WORDS, method=FullPrefill(), paths=MEMORY)
    chunks, said = engine.add(["The company sells maps."]), "a word and another one, " * 40
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": "Yes."}]
    question = [*messages, {"role": "user", "content": "And now?"}]
    kept = asked(engine, chunks, question).report
    store, layer = engine.paths.store, Batch.layer
    assert len(store) > 6

    def damaged(batch, index, number):
        key = batch.keys[index]
        if key.startswith(PATH):
            store.remove(key)
            raise RecordError(f"the record {key.hex()} is damaged and was dropped")
        return layer(batch, index, number)

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "layer", damaged)
        prompt = asked(engine, chunks, question)
    assert far(engine, prompt) < EXACT and prompt.report.reused_tokens == kept.reused_tokens
    assert asked(engine, chunks, question).report.reused_tokens > kept.reused_tokens


def test_an_archive_holds_what_was_read_and_not_what_prompts_computed(tmp_path):
    opened = partial(Engine, tiny_model(), template=TEMPLATE, method=FullPrefill(), paths=True)
    with opened(store=TieredStore(tmp_path / "kv")) as engine:
        asked(engine, engine.add(IDS))
        assert len(engine.store) == 5
    assert export(tmp_path / "kv", tmp_path / "file").records == 3
    import_records(tmp_path / "other", tmp_path / "file", disk_bytes=1 << 30)
    with opened(store=TieredStore(tmp_path / "other")) as engine:
        assert len(engine.store) == 3


def test_another_anchor_is_another_context():
    model, paths = tiny_model(), TieredStore()
    sources = []
    for anchor in ([1, 5], [1, 6]):
        template = PromptTemplate(prefix=[1, 5, 6, 7], anchor=anchor, before_chunk=[9])
        engine = Engine(model, template=template, method=LegoLink(8), paths=paths)
        chunks = engine.add(IDS)
        sources += [asked(engine, chunks).report.sources for _ in range(2)]
    assert sources == [["cpu"] * 3, ["variant"] * 3] * 2


def test_a_repaired_folder_still_loses_what_was_computed_of_what_is_removed(tmp_path):
    opened = partial(Engine, tiny_model(), template=TEMPLATE, method=FullPrefill())
    with opened(store=TieredStore(tmp_path), paths=True) as engine:
        asked(engine, engine.add(IDS))
    assert repair(tmp_path) == 5
    with opened(store=TieredStore(tmp_path)) as engine:
        engine.forget(engine.add(IDS)[1:2])
        assert len(engine.store) == 2
