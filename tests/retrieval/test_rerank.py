"""What orders candidates: functions, objects, and cross-encoders by name."""

import time

import pytest

from ragkv.errors import MissingPackageError, RetrievalError
from ragkv.retrieval import Retrieval, Retriever, SentenceTransformerEmbedder
from ragkv.retrieval.rerank import _loaded

TEXTS = [f"passage {number} about a boat" for number in range(30)]


class Predicts:
    def predict(self, pairs):
        self.pairs = pairs
        return [[float(text.split()[1])] for _, text in pairs]


class Ranks:
    def rank(self, query, documents):
        rows = [{"corpus_id": number, "score": float(text.split()[1])} for number, text in enumerate(documents)]
        return sorted(rows, key=lambda row: -row["score"])


@pytest.fixture
def retriever(embedder):
    with Retriever.open(None, embedder) as retriever:
        retriever.add("a", TEXTS)
        yield retriever


@pytest.mark.parametrize(
    "rerank",
    [lambda question, texts: [float(text.split()[1]) for text in texts], Ranks()],
    ids=["function", "rank"],
)
@pytest.mark.parametrize("hybrid", [False, True])
def test_it_orders_candidates_and_its_scores_are_the_hits(retriever, rerank, hybrid):
    hits = retriever.search("a boat", 3, rerank=rerank, hybrid=hybrid)
    assert [hit.position for hit in hits] == [29, 28, 27] and [hit.score for hit in hits] == [29, 28, 27]
    assert [hit.position for hit in retriever.search("a boat", 9, rerank=rerank, min_score=28)] == [29, 28]
    beside = retriever.search("a boat", 1, rerank=rerank, neighbours=1)
    assert [hit.position for hit in beside] == [29, 28], "neighbours stay behind what was found"


@pytest.mark.parametrize("options", [{}, {"neighbours": 1}, {"hybrid": True, "order": "retrieved"}, {"top_k": 9}])
def test_what_is_found_first_is_told_while_a_slow_one_works(retriever, options):
    def rerank(question, texts):
        at.append(len(told))
        time.sleep(0.002)
        return [-float(number) for number in range(len(texts))]

    retriever.add("copy", [TEXTS[3]])
    told, at, options = [], [], {"top_k": 3, **options}
    best = max(hit.score for hit in retriever.search("a boat 3"))
    for _ in range(2):
        reranked = retriever.find("a boat 3", Retrieval(rerank=rerank, **options), first=told.append)
        retriever.find("a boat 3", Retrieval(**options), first=told.append)
    assert at == [0, 1] and len(told) == 1, "how long it takes was seen first; without one there is nothing to tell"
    assert [hit.passage_id for hit in told[0]] == [hit.passage_id for hit in reranked]
    assert max(hit.score for hit in told[0]) == pytest.approx(best)
    assert {copy.source for hit in reranked for copy in hit.copies} == {"copy"}
    retriever.find("a boat 3", Retrieval(rerank=rerank, hops=2, **options), first=told.append)
    assert len(told) == 1, "a second hop adds to it"


def test_predict_is_asked_for_pairs(retriever):
    model = Predicts()
    with pytest.raises(RetrievalError, match="one finite number for each of 30 texts"):
        retriever.search("a boat", 3, rerank=model)
    model.predict = lambda pairs: [len(question) + float(text.split()[1]) for question, text in pairs]
    assert [hit.score for hit in retriever.search("a boat", 2, rerank=model)] == [35, 34]


@pytest.mark.parametrize("said", [None, [1.0], ["x"] * 30, [float("nan")] * 30, "1" * 30, 3])
def test_bad_scores(retriever, said):
    with pytest.raises(RetrievalError, match="the reranker must give one finite number for each of 30 texts"):
        retriever.search("a boat", 3, rerank=lambda question, texts: said)


@pytest.mark.parametrize("said", [None, [], [{"corpus_id": 0}], [3] * 30])
def test_bad_ranks(retriever, said):
    model = Ranks()
    model.rank = lambda query, documents: said
    with pytest.raises(
        RetrievalError, match=r"rank\(\) of a reranker must give a corpus_id and a score for each of 30"
    ):
        retriever.search("a boat", 3, rerank=model)


def test_a_cross_encoder_by_name(retriever, tmp_path):
    """A tiny random one: what it says is what the library says."""
    from sentence_transformers import CrossEncoder
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "boat", *map(str, range(30))])
    )
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {
        "vocab_size": 36,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    BertForSequenceClassification(BertConfig(**sizes, num_labels=1, initializer_range=1.0)).save_pretrained(tmp_path)
    hits = retriever.search("boat 3", 4, rerank=tmp_path)
    want = CrossEncoder(str(tmp_path)).rank("boat 3", TEXTS, top_k=4)
    assert [hit.score for hit in hits] == pytest.approx([row["score"] for row in want], abs=1e-5)
    assert hits == retriever.search("boat 3", 4, rerank=CrossEncoder(str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    _loaded.cache_clear()
    with pytest.raises(RetrievalError, match=r"the reranker .* cannot be loaded"):
        retriever.search("boat 3", rerank=tmp_path)
    with pytest.raises(RetrievalError, match=r"the embedder .* cannot be loaded"):
        SentenceTransformerEmbedder(tmp_path)


def test_one_that_is_not_there(retriever, tmp_path, monkeypatch):
    with pytest.raises(RetrievalError, match=r"the reranker .*nowhere. cannot be loaded"):
        retriever.search("a boat", rerank=str(tmp_path / "nowhere"))
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(MissingPackageError, match=r"ragkv\[embedder\]"):
        retriever.search("a boat", rerank="some/other-model")
