"""Options of RAG.from_pretrained, and what a folder keeps of them."""

import json

import pytest
import torch

from ragkv import RAG, ArgumentError, LegoLink, ModelNotFoundError, PromptTemplate, RagKVError, RelevantTokens, Reuse
from ragkv.defaults import KEPT, kept_in, to_keep, with_kept
from ragkv.library.measured import Measured
from ragkv.retrieval import Catalogue

from .rags import DOCUMENTS, QUESTION, TEMPLATE, TOKENIZER, WordEmbedder, small_model

TEXT, NAME = DOCUMENTS["clearport.md"], "clearport.md"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A folder with a model in a subfolder, and one with another model whose tokenizer has a chat template."""
    place = tmp_path_factory.mktemp("models")
    for name, seed in (("repository/small", 0), ("chat", 1)):
        small_model(seed).save_pretrained(place / name)
        TOKENIZER.save_pretrained(place / name)
    file = place / "chat" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": CHAT}))
    return place


def opened(model=None, path=None, **options):
    return RAG.from_pretrained(model, path=path, embedder=WordEmbedder(), device="cpu", cpu_bytes=1 << 26, **options)


def test_an_embedder_of_local_files_beside_the_bundled_model(monkeypatch):
    made = []
    monkeypatch.setattr(
        "ragkv.model.loading.SentenceTransformerEmbedder",
        lambda name, local_files_only: made.append((name, local_files_only)) or WordEmbedder(),
    )
    with RAG.from_pretrained(embedder="mine/words", local_files_only=True, cpu_bytes=1 << 26) as rag:
        assert made == [("mine/words", True)] and rag.add_texts([TEXT]).tokens_read > 0


def test_the_bundled_model_brings_its_method(repository):
    with opened() as rag, opened(method=LegoLink()) as told, opened(repository / "chat") as other:
        assert rag.engine.method == RelevantTokens(keep_document=True)
        assert (told.engine.method, other.engine.method) == (LegoLink(), RelevantTokens())


def test_every_option_arrives(repository):
    options = {"context": "chunk", "document_tokens": 200, "piece_tokens": 64, "namespace": "mine", "sensitivity": True}
    more = {"kernels": "reference", "method": LegoLink(k=2), "template": TEMPLATE, "chunk_tokens": 30}
    with opened(repository / "repository", subfolder="small", dtype=torch.float32, **options, **more) as rag:
        documents = rag.engine.documents
        assert (documents.context, documents.document_tokens, documents.namespace) == ("chunk", 200, "mine")
        assert (documents.piece_tokens, documents.kernels) == (64, "reference")
        assert documents.measured == Measured.SENSITIVITY
        assert (rag.engine.method, rag.engine.template) == (LegoLink(k=2), TEMPLATE)
        rag.add_texts([TEXT], [NAME])
        assert max(len(chunk) for chunk in rag.chunks(rag.retrieve(QUESTION))) <= 31
        assert rag.ask(QUESTION, max_new_tokens=2).sources
    with opened(repository / "chat", system="Be brief.", tokenizer=repository / "chat") as rag:
        assert rag.engine.template.prefix.startswith("<system>Be brief.<user>")


def test_options_are_checked_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("ragkv.opening.load_embedder", None)
    monkeypatch.setattr("ragkv.opening.load_model", None)
    with pytest.raises(TypeError, match=r"no option chunk_token; there are: .*chunk_tokens.*dtype.*path.*token"):
        RAG.from_pretrained("some/model", path=tmp_path / "kv", chunk_token=3)
    with pytest.raises(TypeError, match=r"no option chunk_token;"):
        RAG.from_pretrained("some/model", chunk_token=None)
    with pytest.raises(ArgumentError, match=r"revision cannot be given with the bundled model"):
        RAG.from_pretrained(path=tmp_path / "kv", revision="main")
    with pytest.raises(ArgumentError, match=r"template= or system="):
        RAG.from_pretrained("some/model", path=tmp_path / "kv", template=TEMPLATE, system="Be brief.")
    assert not (tmp_path / "kv").exists()


def test_none_says_nothing():
    with opened(revision=None, token=None, system=None, method=None) as rag:
        assert rag.engine.template.prefix.startswith("Read the documents")


def test_a_folder_knows_what_it_was_made_with(repository, tmp_path):
    made = {"subfolder": "small", "dtype": torch.float32, "attn_implementation": "eager", "method": Reuse()}
    made |= {"template": TEMPLATE, "codec": "lossless", "namespace": "mine", "chunk_tokens": 40, "context": "chunk"}
    with opened(repository / "repository", tmp_path, **made) as rag:
        assert not rag.retriever.catalogue.defaults, "opening keeps nothing"
        rag.add_texts([TEXT], [NAME])
        want = rag.ask(QUESTION, max_new_tokens=4)
    with opened(path=tmp_path) as rag:
        assert rag.refresh() == 0
        got = rag.ask(QUESTION, max_new_tokens=4)
        assert (got.token_ids, got.sources, got.report.fusion.hits) == (want.token_ids, want.sources, {"disk": 5})
        assert rag.engine.model.config._attn_implementation == "eager" and rag.engine.method == Reuse()
        assert rag.add_texts([TEXT], [NAME]).tokens_read == 0
        kept = rag.retriever.catalogue.defaults
    assert kept["model"] == str(repository / "repository") and kept["dtype"] == "float32"
    assert kept == json.loads(json.dumps(kept)) and kept.keys() <= {*KEPT}
    with RAG.open(tmp_path, embedder=WordEmbedder(), method=LegoLink(k=3)) as rag:
        assert rag.engine.method == LegoLink(k=3)
        assert rag.ask(QUESTION, max_new_tokens=4).sources == want.sources
        assert rag.retriever.catalogue.defaults == kept, "asking changes nothing"
        rag.add_texts([TEXT], [NAME])
        assert rag.retriever.catalogue.defaults == {**kept, "method": "lego-link:k=3"}, "adding does"
    with pytest.raises(RagKVError, match="no documents in"):
        RAG.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_model_that_was_moved(repository, tmp_path):
    (tmp_path / "model").symlink_to(repository / "chat")
    with opened(tmp_path / "model", tmp_path / "kv", system="Be brief.", method="auto") as rag:
        rag.add_texts([TEXT], [NAME])
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(ModelNotFoundError, match=rf"{tmp_path}/model.*give another name or path with model="):
        opened(path=tmp_path / "kv")
    with opened(tmp_path / "moved", tmp_path / "kv") as rag:  # the same weights, and all else as it was
        assert rag.refresh() == 0 and rag.engine.template.prefix.startswith("<system>Be brief.")
        rag.add_texts([TEXT], [NAME])
    with opened(path=tmp_path / "kv") as rag:
        assert rag.refresh() == 0


def test_another_model_has_its_own_place():
    kept = {"model": "a/b", "revision": "v1", "tokenizer": "t", "dtype": "float32", "system": "S", "codec": "int8"}
    assert with_kept({"model": "a/b", "codec": None}, kept) == kept
    assert with_kept({"model": "c/d"}, kept) == {"model": "c/d", "dtype": "float32", "system": "S", "codec": "int8"}
    assert with_kept({"model": "bundled"}, kept) == {"model": "bundled", "codec": "int8"}
    assert with_kept({"template": TEMPLATE}, kept) == {
        **{n: kept[n] for n in kept if n != "system"},
        "template": TEMPLATE,
    }
    assert with_kept({}, {"from a newer version": 1, "namespace": "x"}) == {"namespace": "x"}


@pytest.mark.parametrize("sensitivity", [False, True])
def test_who_stops_at_a_step_has_what_it_says_was_read(sensitivity):
    with opened("bundled", sensitivity=sensitivity, piece_tokens=100) as rag:
        steps = []

        def stop(progress):
            steps.append(progress)
            if progress.reason == "new" and progress.done_tokens:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rag.add_texts([TEXT], [NAME], progress=stop)
        last = steps[-1]
        assert 0 < last.done_tokens < last.tokens
        assert rag.add_texts([TEXT], [NAME]).tokens_read == last.tokens - last.done_tokens


def test_it_is_kept_before_reading_which_may_be_cut_short(repository, tmp_path):
    def stop(step):
        if step.done_tokens:
            raise KeyboardInterrupt

    with opened(repository / "chat", path=tmp_path, piece_tokens=16) as rag, pytest.raises(KeyboardInterrupt):
        rag.add_texts([TEXT], [NAME], progress=stop)
    assert kept_in(tmp_path)["model"] == str(repository / "chat")


def test_what_is_kept_is_json_and_runs_nothing():
    class Own(Reuse):
        pass

    template = PromptTemplate(prefix=torch.tensor([1, 2]), before_chunk=(3,), stop="\n\n")
    given = {"template": template, "trust_remote_code": True, "token": "secret", "cache_dir": "/c", "method": Own()}
    kept = to_keep({**given, "embedder": WordEmbedder(), "tokenizer": TOKENIZER, "dtype": torch.bfloat16, "system": ""})
    parts = {"anchor": None, "after_chunk": "", "before_question": "", "after_question": "", "stop": ["\n\n"]}
    parts |= {"after_answer": "", "chat": None}
    assert kept == {"template": {"prefix": [1, 2], "before_chunk": [3], **parts}, "dtype": "bfloat16", "system": ""}
    assert with_kept({}, kept)["template"].prefix == [1, 2]
    assert "template" not in with_kept({"model": "another"}, kept)


def test_defaults_stand_in_the_catalogue(tmp_path):
    with Catalogue(tmp_path) as catalogue:
        assert catalogue.defaults == {}
        catalogue.keep_defaults({"model": "a/b"})
        state = catalogue.state
        catalogue.keep_defaults({"model": "c/d"})
        assert catalogue.state == state
    with Catalogue(tmp_path) as catalogue:
        assert catalogue.defaults == {"model": "c/d"} and catalogue.settings == {}
