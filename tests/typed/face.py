"""The public face as type checkers see it.

Read by mypy --strict and pyright where a wheel is installed (`make typing`), never run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, assert_type

from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

import ragkv
from ragkv.distributed import Precomputed, precompute
from ragkv.report import ChunkReport

ERRORS: tuple[type[ragkv.RagKVError], ...] = (
    ragkv.ArgumentError,
    ragkv.ArgumentTypeError,
    ragkv.CalibrationError,
    ragkv.ConversationError,
    ragkv.DeadlineError,
    ragkv.DocumentError,
    ragkv.IncompatibleFolderError,
    ragkv.IncompleteAnswerError,
    ragkv.MethodError,
    ragkv.MissingPackageError,
    ragkv.ModelChangedError,
    ragkv.ModelNotFoundError,
    ragkv.NonFiniteError,
    ragkv.OverloadedError,
    ragkv.PromptError,
    ragkv.PromptTooLongError,
    ragkv.PublicationError,
    ragkv.RecordError,
    ragkv.RetrievalError,
    ragkv.StoreError,
    ragkv.StoreFullError,
    ragkv.UnknownArgumentError,
    ragkv.UnsupportedModelError,
    ragkv.UploadError,
)

REPLICA: str = ragkv.route(["a document"], {"a": 0, "b": 2.0}, held={"b": {"a document"}}, bound=1.5)

METHODS: Sequence[ragkv.Method] = (
    ragkv.Auto(ttft_s=0.5),
    ragkv.CacheBlend(ratio=0.15),
    ragkv.CacheCraft(alpha=0.5),
    ragkv.Calibrated(),
    ragkv.FullPrefill(),
    ragkv.LegoLink(k=16),
    ragkv.Oracle(),
    ragkv.QuestionAware(ratio=0.2),
    ragkv.Random(),
    ragkv.RelevantTokens(ratio=0.1, keep_document=True),
    ragkv.Reuse(),
    ragkv.SensitiveTokens(ratio=0.1),
    ragkv.Union(ragkv.LegoLink(8), ragkv.SensitiveTokens(0.05)),
)


@dataclass(frozen=True)
class Own(ragkv.Method):
    """A method of one's own."""

    count: int = 8

    def select(self, view: ragkv.View) -> Tensor | ragkv.Selection:
        layout = assert_type(view.layout, ragkv.Layout)
        chosen = assert_type(layout.reusable, Tensor)[: self.count]
        assert_type(view.deviation, Tensor)
        return ragkv.Selection(chosen)

    def narrow(self, check: ragkv.Check) -> Tensor:
        return assert_type(check.tokens, Tensor)


LINES: Sequence[ragkv.Scheduler] = (
    ragkv.Scheduler("cached-first", at_once=8),
    ragkv.Scheduler(ragkv.Fair({"a": 2.0}, slack=1000), memory_bytes=8 << 30, wait_s=30),
    ragkv.Scheduler(ragkv.CachedFirst(window=16)),
)


def tell(progress: ragkv.Progress) -> None:
    assert_type(progress.source, str)
    assert_type(progress.done_tokens, int)


def engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    store = ragkv.TieredStore("kv/", cpu_bytes=32 << 30, disk_bytes=500 << 30)
    template = ragkv.PromptTemplate(prefix=[1], after_chunk="\n", before_question="{a}{b}", slots={"a": "", "b": [2]})
    with ragkv.Engine(model, tokenizer, store=store, template=template, method=Own(), gate=ragkv.Gate()) as made:
        assert_type(made, ragkv.Engine)
        assert_type(made.piece_tokens, int)
        chunks = assert_type(made.add_document(["a", [1, 2]]), list[ragkv.Chunk])
        assert_type(made.add_document(["b"], behind=[*chunks, "c"])[0].front, int)
        assert_type(made.add(["a passage"]), list[ragkv.Chunk])
        assert_type(ragkv.Chunk.from_dict(chunks[0].to_dict()), ragkv.Chunk)

        prompt = assert_type(made.fuse(chunks, "a question?", method="lego-link:k=16"), ragkv.FusedPrompt)
        assert_type(prompt.input_ids, Tensor)
        assert_type(prompt.logits, Tensor)
        cache: Cache = prompt.past_key_values
        assert_type(cache.get_seq_length(), int)
        report = assert_type(prompt.report, ragkv.FusionReport)
        assert_type(report.hits, dict[str, int])
        assert_type(report.ran, str)
        assert_type(report.milliseconds, dict[str, float])

        answer = made.generate(chunks, "a question?", max_new_tokens=64, stop=["\n"], slots={"a": "German"})
        assert_type(answer, ragkv.Answer)
        assert_type(answer.text, str)
        assert_type(answer.report.first_token_ms, float)
        assert_type(answer.report.ran, str)
        assert_type(answer.report.plot(), Figure)
        assert_type(report.chunks, list[ChunkReport])
        assert_type(report.recomputed, list[tuple[int, int]])
        assert_type(chunks[0].name, str)
        assert_type(chunks[0].id, str)
        stream = assert_type(made.stream(chunks, "a question?"), ragkv.AnswerStream)
        for piece in stream:
            assert_type(piece, str)
        assert_type(made.fuse_many([(chunks, "a question?")], method="reuse"), list[ragkv.FusedPrompt])
        assert_type(made.generate_many([(chunks, "a question?")], at_once=2), list[ragkv.Answer])
        assert_type(made.forget(chunks), int)
        assert_type(made.calibrate([(chunks, "a question?")], kl=0.1).chosen, str)
        ragkv.Engine(model, graphs=False).close()
        rates = assert_type(assert_type(made.advise(limit_s=5), ragkv.Advice).rates, ragkv.Rates)
        assert_type(made.fuse(chunks, "a question?", method=ragkv.Auto(rates=rates)).report.why, str)

    kv = store.get(b"key")
    if kv is not None:
        assert_type(kv, ragkv.ChunkKV)
        assert_type(kv.keys, list[Tensor])
    assert_type(store.pin(b"key", lifetime_s=60), bool)


async def rag() -> None:
    with ragkv.RAG.from_pretrained("Qwen/Qwen3-0.6B", path="kv/", chunk_tokens=128, dtype="bfloat16") as opened:
        assert_type(opened, ragkv.RAG)
        assert_type(opened.add_texts(["a text"], ["a name"], progress=tell).tokens_read, int)
        assert_type(opened.add_files("docs/").skipped[0].reason, str)
        assert_type(opened.sync("docs/").removed, list[str])
        assert_type(opened.plan_files("docs/").kv_bytes, dict[str, int])
        assert_type(opened.documents()[0].tokens, int | None)

        answer = opened.ask("a question?", top_k=5, method=ragkv.Reuse())
        checked: ragkv.Answer = answer
        assert_type(checked.text, str)
        assert_type(answer.sources[0].source, str)
        assert_type(answer.sources[0].metadata, dict[str, Any])
        assert_type(answer.sources[0].copies[0].source, str)
        assert_type(answer.report.fusion.speculated, str)
        hits, stream = opened.stream("a question?")
        assert_type(hits[0].score, float)
        assert_type(next(stream), str)

        retrieval = ragkv.Retrieval(top_k=5, hybrid=True, where={"year": 2026}, order="best-last")
        assert_type(retrieval.hops, int)
        assert_type(opened.retrieve("a question?", hybrid=True)[0].text, str)
        session = opened.session()
        assert_type(session.ask("a question?").text, str)
        assert_type(session.messages, list[dict[str, str]])

        assert_type((await opened.aask("a question?")).text, str)
        assert_type(opened.ask_many(["a question?"], at_once=2)[0].text, str)
        async for piece in opened.astream("a question?"):
            assert_type(piece, str)
        assert_type(opened.pin("a name"), int)
    assert_type(ragkv.RAG.open("kv/"), ragkv.RAG)
    with ragkv.RAG.from_pretrained(remote="s3://bucket/prefix", follow=True) as follower:
        assert_type(follower.follow().removed, tuple[str, ...])
        assert_type(follower.publish().documents, int)
    assert_type(ragkv.__version__, str)


def clustered(paths: list[str]) -> dict[str, str]:
    report: Precomputed = precompute(paths, "bundled", remote="s3://bucket/prefix", workers=2, gpus=0.5, namespace="a")
    assert_type(report.tokens_read, int)
    return report.failed
