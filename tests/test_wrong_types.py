"""Whatever is given in place of what a public method takes: an error of ours that says what it must be."""

import pytest
import torch

import ragkv
from ragkv import (
    RAG,
    ArgumentTypeError,
    CacheBlend,
    ChunkKV,
    Engine,
    LegoLink,
    MethodError,
    Oracle,
    PromptError,
    QuestionAware,
    RagKVError,
    Reuse,
    TieredStore,
)
from ragkv.errors import RetrievalError
from ragkv.exchange import export_folder, import_folder
from ragkv.retrieval import Catalogue, FaissIndex, Retriever, load_files, read_file

from .rag.rags import TEMPLATE, TOKENIZER, WordEmbedder, open_rag, small_model

CHAT = [{"role": "user", "content": "hi"}]
NO_LIST = (None, 3, "one text", b"bytes", {"a": "b"})


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def rag(model):
    with open_rag(model=model) as rag:
        rag.add_texts(["Clearport lies on the Aire."], ["a"])
        yield rag


def refused(call, *arguments, match=None, **named):
    """A lazy answer is begun."""
    with pytest.raises(RagKVError, match=match):
        answer = call(*arguments, **named)
        next(answer[-1] if isinstance(answer, tuple) else answer)


def test_an_engine_takes_a_model(model):
    with pytest.raises(
        ArgumentTypeError, match=r"model must be .* got the name 'Qwen/x': load it first .*RAG\.from_pretrained"
    ):
        Engine("Qwen/x")
    for thing in (None, 3, {}):
        refused(Engine, thing)
    refused(Engine, model, "Qwen/x", match=r"tokenizer must be .*load it first")
    refused(Engine, model, TOKENIZER, store="kv/", match=r"store must be a ragkv\.TieredStore")
    for template in ("hi", {}):
        refused(Engine, model, TOKENIZER, template=template, match=r"template must be a ragkv\.PromptTemplate")
    for options in (
        {"lifetime_s": "1h"},
        {"namespace": 3},
        {"context": "x"},
        {"piece_tokens": "x"},
        {"method": "reuse it"},
    ):
        refused(Engine, model, TOKENIZER, **options, match=next(iter(options)))


def test_a_calibration_has_cases_and_tells_a_function(model):
    engine = Engine(model, TOKENIZER, template=TEMPLATE, method=Reuse())
    for cases in NO_LIST:
        refused(engine.calibrate, cases, match="cases must be a list|each of cases")
    refused(engine.calibrate, [([[5]], [7])] * 99, kl=0.5, progress=3, match="progress must be a function")


def test_a_document_has_parts_and_stops_are_texts(model):
    engine = Engine(model, TOKENIZER, template=TEMPLATE, method=Reuse())
    refused(engine.add_document, [], match="at least one part")
    refused(engine.generate, ["One passage."], "what?", stop=3, match="stop must be a text")


def test_knobs_of_methods_and_policies_are_numbers():
    for made in (
        *(lambda k=k: ragkv.LegoLink(k=k) for k in ("x", 1.5, True, -1)),
        *(lambda layer=layer: CacheBlend(check_layer=layer) for layer in ("x", 1.5, 0)),
        *(lambda layer=layer: ragkv.Oracle(layer=layer) for layer in ("x", 1.5, 0)),
        *(lambda threshold=threshold: CacheBlend(threshold=threshold) for threshold in ("x", float("nan"), -1)),
    ):
        refused(made, match="must be")
    refused(ragkv.Fair, 3, match="shares must be")
    for shares in ({"a": "x"}, {"a": 0}, {"a": float("nan")}):
        refused(ragkv.Fair, shares, match="shares: that of 'a' must be")
    for name in ("reused", "computed", "output", "slack"):
        refused(ragkv.Fair, **{name: "x"}, match=f"{name} must be")
        refused(ragkv.Fair, **{name: float("nan")}, match=f"{name} must be")


def test_a_store_has_a_folder_and_keys(tmp_path):
    refused(TieredStore, 3, match="path must be the path of a folder")
    for path in ("a\0b", "", "\ud800"):
        for opened in (TieredStore, Catalogue, RAG.open, lambda path: RAG.from_pretrained(path=path)):
            refused(opened, path, match="path must be the path of a folder")
    refused(TieredStore, tiers=3, match="tiers must be a list")
    refused(TieredStore, gpu_bytes=10, device="nope", match="no device 'nope'")
    with TieredStore(tmp_path) as disk, TieredStore() as memory:
        for store in (disk, memory):
            for key in (None, 3, "key"):
                for name in ("get", "contains", "remove", "pin", "unpin"):
                    refused(getattr(store, name), key, match="a key must be bytes")
                for name in (
                    *("read", "missing", "where", "sizes", "prefetch", "remove_many", "pin_many", "unpin_many"),
                    *("pinned", "worst", "computed_of", "beginning", "headers"),
                ):
                    refused(getattr(store, name), [key], match="a key must be bytes")
                    refused(getattr(store, name), 3, match="keys must be a list")


WRONG_PUTS = {
    "cost_s": ("1", None),
    "lifetime_s": ("3", None),
    "namespace": (5, None, "\ud800"),
    "label": (5, None),
    "rotations": (5, [3]),
}


def test_a_store_is_given_kv_and_facts(tmp_path):
    kv = ChunkKV([torch.zeros(1, 2, 4)], [torch.zeros(1, 2, 4)], 0)
    with TieredStore(tmp_path) as disk, TieredStore() as memory:
        for store in (disk, memory):
            for wrong in (None, torch.zeros(1, 2, 4)):
                refused(store.put, b"a", wrong, match="kv must be a ChunkKV")
            for name, values in WRONG_PUTS.items():
                for value in values:
                    refused(store.put, b"a", kv, **{name: value}, match=name)
            for items in (None, [5], [()]):
                refused(store.put_many, items, match="items must be a list")
            for facts in (None, ["a"]):
                refused(store.put_many, [], facts=facts, match="fact")
            for name in (None, 5, b"a", "\ud800"):
                refused(store.meta_get, name, match="named by text")
                refused(store.remove_many, [], [name], match="named by text")
            refused(store.remove_many, [], "name", match="in a list")
            refused(store.set_quota, "\ud800", 5, match="namespace")
            refused(store.flush, "3", match="limit_s")
            store.set_quota("a", 1 << 70)
            assert len(store) == 0


def test_a_model_has_a_name_and_a_place(tmp_path):
    refused(RAG.from_pretrained, 3, match="model must be the name or path")
    refused(RAG.from_pretrained, "bundled", device="nope", match="no device 'nope'")
    refused(RAG.from_pretrained, "bundled", dtype="x", match="no dtype 'x'")
    refused(RAG.from_pretrained, tmp_path, match="there is no config.json in this folder")
    (tmp_path / "config.json").write_text("{}")
    refused(RAG.from_pretrained, tmp_path, match="the model .* cannot be loaded")


def test_options_of_a_folder_are_looked_at_first(monkeypatch):
    """Before an embedder or a model is loaded."""
    monkeypatch.setattr("ragkv.opening.load_embedder", lambda *args: pytest.fail("it was loaded"))
    for wrong in (3, b"kv", ["kv"], {}):
        refused(RAG.from_pretrained, path=wrong, match="path must be the path of a folder")
        refused(RAG.from_pretrained, store=wrong, match=r"store must be a ragkv\.TieredStore")
    for name in ("readonly", "follow"):
        for wrong in (None, 1, "no"):
            refused(RAG.from_pretrained, **{name: wrong}, match=f"{name} must be True or False")


@pytest.mark.parametrize("embedder", ["", " ", 0, [], {}])
def test_an_embedder_is_one(embedder):
    refused(RAG.from_pretrained, embedder=embedder, match="embedder must be")
    refused(Retriever.open, embedder=embedder or {}, match="embedder must be")


@pytest.mark.parametrize("kernels", ["", -1, None, float("nan"), [], {}, "cuda"])
def test_kernels_are_known(model, kernels):
    refused(
        Engine,
        model,
        TOKENIZER,
        template=TEMPLATE,
        kernels=kernels,
        match="must be one of auto, reference, triton",
    )


def test_whether_sensitivities_are_measured_is_true_or_false(model):
    for wrong in (0, "no", []):
        refused(
            Engine,
            model,
            TOKENIZER,
            template=TEMPLATE,
            sensitivity=wrong,
            match="sensitivity must be True, False or None",
        )


@pytest.mark.parametrize("namespace", [3, 0, b"a", [], "\ud800"])
def test_a_namespace_is_a_text(rag, namespace):
    retriever, catalogue = rag.retriever, rag.retriever.catalogue
    for ask in (catalogue.get, catalogue.texts, catalogue.remove, retriever.remove):
        refused(ask, "a", namespace, match="namespace must be")
    refused(catalogue.documents, namespace, match="namespace must be")
    refused(catalogue.rename, "a", "b", lambda reading: reading, namespace, match="namespace must be")
    refused(retriever.add_many, [("b", ["text"], None)], namespace, match="namespace must be")
    refused(retriever.add, "b", ["text"], namespace=namespace, match="namespace must be")
    refused(retriever.search, "river?", namespace=namespace, match="namespace must be")


def test_what_a_catalogue_and_an_index_are_asked_for(rag):
    for wrong in (None, "1", 1.5):
        refused(rag.retriever.catalogue.passage, wrong, match="passage_id must be")
    for fact in ({"headings": ["\ud800"]}, {"origin": "\ud800"}, {"file": "\ud800"}):
        refused(rag.retriever.add, "b", ["text"], **fact, match="half a surrogate pair")
    for wrong in ("one", ["one"], [[1.0], [1.0, 2.0]], {}):
        refused(FaissIndex(2).add, [1], wrong, match="vectors must be numbers")
        refused(FaissIndex(2).search, wrong, 1, match="vectors must be numbers")
    refused(rag.engine.add_document, [[5]], document_id="\ud800", match="document_id must be")


def test_files_to_read_are_paths_and_their_limit_a_number():
    for wrong in (None, 3, b"a", ["a"]):
        refused(read_file, wrong, match="paths must be")
    refused(read_file, "a\0b", match="no name of a file")
    for wrong in (None, "1", 1.5, -1):
        for read in (read_file, load_files):
            refused(read, __file__, max_bytes=wrong, match="max_bytes must be")


def test_an_archive_has_a_place(rag, tmp_path):
    with Retriever.open(tmp_path / "documents", rag.retriever.embedder) as retriever:
        retriever.add("a", ["text"])
    for name in ("a\0b", "\ud800", "x" * 300):
        refused(export_folder, tmp_path, tmp_path / name, match="cannot be written")
        refused(
            import_folder, tmp_path / "other", tmp_path / name, disk_bytes=1, match="there is no file|cannot be read"
        )


def test_a_reranker_has_a_name(rag):
    for wrong in ("", " "):
        refused(rag.retrieve, "river?", rerank=wrong, match="rerank must be a cross-encoder's name")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_no_file_can_be_called_is_no_file(rag, name):
    for path in (name, [name]):
        refused(rag.add_files, path, match="no name of a file")
    refused(rag.sync, name, match="no folder that is there")
    for ask in (rag.remove, rag.pin, rag.unpin):
        refused(ask, name, match="no document is called")


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "length_penalty": "x"},
        {"guidance_scale": "x"},
        pytest.param({"do_sample": True, "temperature": 10**400}, id="beyond all floats"),
        {"forced_eos_token_id": True},
        {"repetition_penalty": "x"},
        {"watermarking_config": 3},
        {"bad_words_ids": [[10**6]]},
        {"sequence_bias": {(10**6,): 1.0}},
        {"sequence_bias": [[[10**6], 1.0]]},
        {"sequence_bias": 3},
        {"forced_eos_token_id": 10**6},
        {"forced_bos_token_id": -1},
        {"max_time": float("nan")},
        *({name: wrong} for name in ("min_new_tokens", "no_repeat_ngram_size") for wrong in ("", [], 1.5, True)),
        *({"eos_token_id": wrong} for wrong in (1.5, [1.5], {}, "</s>")),
        *({name: float("nan")} for name in ("pad_token_id", "bos_token_id")),
    ],
    ids=str,
)
def test_generation_arguments_are_looked_at_before_the_prompt_is_computed(model, options):
    engine = Engine(model, TOKENIZER, template=TEMPLATE, method=Reuse())
    refused(engine.generate, [[5]], [7], **options, match=list(options)[-1])
    assert not engine.stats().forwards


@pytest.mark.parametrize(
    "options",
    [
        {"forced_eos_token_id": {}},
        {"exponential_decay_length_penalty": []},
        {"exponential_decay_length_penalty": {2.5: 1}},
        {"begin_suppress_tokens": [{}]},
    ],
    ids=str,
)
def test_what_transformers_stumbles_over_is_refused(model, options):
    engine = Engine(model, TOKENIZER, template=TEMPLATE, method=Reuse())
    refused(engine.generate, [[5]], [7], **options, match="transformers refuses the generation arguments")
    assert not engine.stats().forwards


def test_numbers_are_numbers(tmp_path):
    for method, name, wrong in (
        (CacheBlend, "ratio", ("x", None)),
        (CacheBlend, "check_layer", ("1", 1.5, 0)),
        (CacheBlend, "threshold", ("x", float("nan"), -1)),
        (CacheBlend, "gradual", (0.5, ("x",))),
        (LegoLink, "k", ("16", 1.5, None, True)),
        (Oracle, "layer", ("1", 1.5, 0)),
        (QuestionAware, "queries", (3, ["all"])),
    ):
        for value in wrong:
            with pytest.raises(MethodError, match=f"{method.__name__}: {name} "):
                method(**{name: value})
    refused(TieredStore, tmp_path, cpu_bytes="8GiB", match="budgets are bytes, got .* cpu '8GiB'")
    refused(RAG.open, 3, match="path must be the path of a folder")


def test_a_chunker_is_one(rag):
    refused(setattr, rag, "chunker", 96, match=r"chunker must be a ragkv\.retrieval\.TokenChunker, got 96")


@pytest.mark.parametrize("name", ["fuse", "generate", "stream"])
def test_a_question_is_one_text(model, name):
    engine = Engine(model, TOKENIZER, template=TEMPLATE, method=Reuse())
    chunks, ask = engine.add(["One passage."]), getattr(engine, name)
    refused(ask, chunks, ["first?", "second?"], match="ask these 2 one by one")
    refused(ask, chunks, CHAT[0], match="not chat messages")
    for question in (None, 3, b"x", {"q": 1}, "", [], [1, "x"]):
        refused(ask, chunks, question)
    for given in (*NO_LIST, chunks[0], [None], [3], [CHAT], [{"a": 1}], [chunks]):
        refused(ask, given, "what?")
    refused(ask, chunks, "what?", method="reuse it", match="there are: auto")


def test_an_engine_takes_lists_of_texts_and_chunks(model):
    engine = Engine(model, TOKENIZER, template=TEMPLATE, method=Reuse())
    chunks = engine.add(["One passage."])
    for given in (*NO_LIST, [None], [3], [""], [["a"]], [b"x"], [{"a": 1}]):
        refused(engine.add, given)
        refused(engine.add_document, given)
    refused(engine.add_document, ["x"], document_id=3)
    refused(engine.add_document, ["x"], behind="text", match="behind must be a list")
    refused(engine.add_document, ["x"], behind=[5])
    for given in (*NO_LIST, chunks[0], [None], ["x"]):
        refused(engine.forget, given)
        refused(engine.repair_document, given, ["x"])
    refused(engine.repair_document, chunks, ["x"], behind_tokens="x")
    for starts in (3, "x", [None]):
        refused(engine.fuse, chunks, "what?", starts=starts)
    refused(engine.fuse, chunks, "what?", room_tokens="x")
    assert len(engine.store) == 1, "nothing is lost"


@pytest.mark.parametrize("name", ["ask", "stream", "retrieve"])
def test_rag_answers_one_question(rag, name):
    ask = getattr(rag, name)
    with pytest.raises(RetrievalError, match="ask these 2 one by one"):
        ask(["first?", "second?"])
    with pytest.raises(RetrievalError, match="not chat messages"):
        ask(CHAT)
    for question in (None, 3, b"x", {"q": 1}, " ", []):
        refused(ask, question, match="question")
    for number in ("x", None, -1, 1.5, True):
        refused(ask, "what?", neighbours=number, match="neighbours must be a whole number of at least 0")
        if number is not None:  # the default
            refused(ask, "what?", top_k=number)
    refused(ask, "what?", hops="x", match="hops must be a whole number")
    refused(ask, "what?", where=3, match="where must be a dict")
    refused(ask, "what?", min_score="x", match="min_score must be a number")
    if name != "retrieve":
        refused(ask, "what?", progress=3, match=r"a function that takes a ragkv\.Progress")


def test_rag_takes_documents(rag):
    for given in (*NO_LIST, [None], [3], [b"x"], [["x"]]):
        refused(rag.add_texts, given)
    for names in (["a", "b"], "a", [3]):
        refused(rag.add_texts, ["text"], names)
    for extra in (["s"], [{"a": object()}], {"a": 1}, "s"):
        refused(rag.add_texts, ["text"], ["b"], extra)
    for paths in (None, 3, [None], [3], b"x", "", [""]):
        refused(rag.add_files, paths)
        refused(rag.sync, paths)
    for call in (lambda **more: rag.add_texts(["x"], **more), rag.refresh):
        refused(call, progress=3, match="progress must be a function")
    for source in (None, 3, "zz", b"a", ["a"]):
        for call in (rag.remove, rag.pin, rag.unpin):
            refused(call, source)
    for lifetime_s in ("x", None, 0):
        refused(rag.pin, "a", lifetime_s)
    for hits in (None, "x", 3, [None], ["x"]):
        refused(rag.chunks, hits)
    assert [document.source for document in rag.documents()] == ["a"]


def test_rag_is_made_of_an_engine_and_a_retriever(rag, model):
    for engine, retriever in ((None, None), (model, rag.retriever), (rag.engine, None), (rag.retriever, rag.engine)):
        refused(RAG, engine, retriever, match="must be a ragkv")
    refused(RAG, rag.engine, rag.retriever, 256, match="chunker")
    for tokens in ("x", -1):
        refused(RAG, rag.engine, rag.retriever, None, tokens, match="repair_tokens")


def test_a_retriever_takes_documents():
    with Retriever.open(None, WordEmbedder()) as retriever:
        for given in (None, 3, "x", [3], [("a",)], ["abc"], [("a", "b", None)]):
            refused(retriever.add_many, given)
        for arguments in ((3, ["x"]), ("s", "x"), ("s", [3]), ("s", None), ("s", ["x"], "metadata")):
            refused(retriever.add, *arguments)
        for more in ({"spans": 3}, {"spans": ["x"]}, {"origin": 3}, {"reading": 3}):
            refused(retriever.add, "s", ["x"], **more)
        for source in (None, 3, ["a"], b"a"):
            refused(retriever.remove, source)
        refused(retriever.search, ["first?", "second?"], match="one by one")
        assert not len(retriever.catalogue)
    for path, embedder in ((3, WordEmbedder()), (None, "all-MiniLM-L6-v2"), (None, 3)):
        refused(Retriever.open, path, embedder, match="must be (the path|a)")
    refused(Retriever, None, None, None, match="embedder must be")


def test_the_error_is_both(model):
    """Who caught TypeError and ValueError before still does."""
    assert issubclass(ragkv.ArgumentTypeError, RagKVError) and issubclass(ragkv.ArgumentTypeError, TypeError)
    assert issubclass(PromptError, ValueError)
