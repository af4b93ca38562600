"""The parts of a :class:`~ragkv.RAG`, from a model's name and a folder's path."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Set
from contextlib import ExitStack
from typing import Any, NamedTuple

from ragkv.defaults import kept_in, to_keep, with_kept
from ragkv.engine import Engine
from ragkv.errors import ArgumentError, instance
from ragkv.folder.filesystem import folder_path, has_data
from ragkv.library.given import check_store
from ragkv.model.loading import BUNDLED, OPTIONS, check_options, gguf_apart, load_embedder, load_model
from ragkv.publishing import pool_to_follow, published_defaults
from ragkv.retrieval import Retriever, TokenChunker
from ragkv.store import RemoteTier, TieredStore

logger: logging.Logger = logging.getLogger(__name__)

#: What is said once, when a new folder is opened and nobody has named a model; how to name one follows.
TOY = "no model is named: the bundled one is a toy that knows one made-up world. For texts of your own name a real one"

_OF_ENGINE = (
    *("context", "document_tokens", "piece_tokens", "namespace", "sensitivity"),
    *("kernels", "graphs", "lifetime_s", "gate", "scheduler", "paths"),
)


class Parts(NamedTuple):
    """What a RAG is made of, and the options that its folder keeps."""

    engine: Engine
    retriever: Retriever
    chunker: TokenChunker
    behind: int
    defaults: dict[str, Any]


def settled(given: Mapping[str, Any], own: Set[str], kept: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, and what is kept where nothing was; checked before anything is loaded.

    Args:
        given: the arguments of :meth:`ragkv.RAG.from_pretrained`, which says what they mean and what is raised.
        own: the names of those that are not the model's.
        kept: what the folder keeps.
    """
    instance("model", given["model"], str | os.PathLike | None, "the name or path of a model")
    model, rest = gguf_apart(given["model"], dict(given))
    given = {**rest, "model": model}
    options = with_kept(given, kept)
    if "model" not in options:
        logger.warning(
            f"{TOY}: RAG.from_pretrained('Qwen/Qwen3-0.6B'), or whatever decoder of transformers it is to be"
        )
    name = options.setdefault("model", BUNDLED)
    check_options(name, options.keys() | (given.keys() - OPTIONS - own), own)
    return options


def open_parts(given: Mapping[str, Any], own: Set[str], opened: ExitStack) -> Parts:
    """Load a model and open a folder, with what the folder keeps where nothing is said.

    Args:
        given, own: as for :func:`settled`.
        opened: what is to be closed is entered here.
    """
    path = None if given["path"] is None else folder_path(given["path"])
    check_store(given["store"])
    for name in ("readonly", "follow"):
        instance(name, given[name], bool, "True or False")
    pool = _followed(given, opened) if given["follow"] else given["remote"]
    kept = kept_in(path)
    if given["follow"] and not kept:
        kept = published_defaults(pool, given["namespace"] or "")
    options = settled(given, own, kept)
    if given["store"] is not None and given["remote"] is not None:
        raise ArgumentError("give store= or remote=, not both: TieredStore('kv/', remote=...) has both")
    embedder = load_embedder(options.get("embedder"), bool(options.get("local_files_only")))
    readonly = given["readonly"]
    retriever = Retriever.open(None if path is None else path / "documents", embedder, readonly=readonly)
    opened.callback(retriever.close)

    def store() -> TieredStore:
        if given["store"] is not None:
            return given["store"]
        kv = None if path is None or (readonly and not has_data(path / "kv")) else path / "kv"
        return TieredStore(
            kv,
            readonly=readonly,
            codec=options.get("codec", "raw"),
            cpu_codec=options.get("cpu_codec"),
            remote=pool,
            **{limit: given[limit] for limit in ("gpu_bytes", "cpu_bytes", "disk_bytes")},
        )

    engine, chunker = open_engine(options, store, opened)
    return Parts(engine, retriever, chunker, options.get("behind", 0), to_keep(options))


def open_engine(
    options: Mapping[str, Any], store: Callable[[], TieredStore], opened: ExitStack
) -> tuple[Engine, TokenChunker]:
    """Load a model; what it reads, and how texts are cut for it, hangs on the options alone.

    Args:
        options: of :func:`settled`.
        store: opens the one for KV, once the model is there.
        opened: the store, which is to be closed, is entered here.
    """
    name = options["model"]
    place = {option: value for option, value in options.items() if option in OPTIONS}
    loaded = load_model(name, options.get("device"), place, options.get("tokenizer"), options.get("system"))
    kept = store()
    opened.callback(kept.close)
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        store=kept,
        template=options.get("template", loaded.template),
        foreign=options.get("foreign", loaded.foreign),
        method=options.get("method", loaded.method),
        **{name: options[name] for name in _OF_ENGINE if name in options},
    )
    tokens = options.get("chunk_tokens", 96 if name == BUNDLED else 256)
    return engine, TokenChunker(loaded.tokenizer, tokens)


def _followed(given: Mapping[str, Any], opened: ExitStack) -> RemoteTier:
    """The pool whose publication is followed."""
    if given["readonly"] and given["path"] is not None:
        raise ArgumentError(
            "a folder that is open for reading only cannot follow: leave out readonly=, nothing is written to the pool anyway; or "
            "path=, then all is in memory"
        )
    pool = given["remote"] if given["store"] is None else given["store"].remote
    if isinstance(pool, str):
        pool = RemoteTier(pool, readonly=True)
        opened.callback(pool.close)
    return pool_to_follow(pool)
