"""Opening the folder that a command works on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkv.cli import show
from ragkv.cli.pools import pool_of
from ragkv.errors import RagKVError, UploadError
from ragkv.folder.filesystem import has_data

if TYPE_CHECKING:
    from ragkv.rag import RAG
    from ragkv.store import TieredStore

_PATIENCE_S = 10.0

# Options of the command line that are called as in Python.
_ALIKE = (
    *("model", "tokenizer", "dtype", "weights", "revision", "subfolder", "gguf_file"),
    *("system", "namespace", "embedder", "foreign"),
    *("cache_dir", "local_files_only", "trust_remote_code", "method", "chunk_tokens", "codec", "cpu_codec", "behind"),
)


def open_rag(folder: Path | None, quiet: bool = False, **options: Any) -> RAG:
    """Load model and embedder and open a folder, which is made if it is not there.

    Args:
        folder: documents, vectors and KV; ``None``: in memory.
        quiet: do not say on a terminal that a new folder's model is the bundled one.
        **options: of :meth:`RAG.from_pretrained`; ``None`` for the folder's own, or its default.
    """
    from transformers.utils import logging

    from ragkv.defaults import kept_in
    from ragkv.model.loading import BUNDLED
    from ragkv.opening import TOY
    from ragkv.rag import RAG

    terminal, kept = sys.stderr.isatty(), kept_in(folder)
    if options.get("model") is None and "model" not in kept and not options.get("follow"):
        options["model"] = BUNDLED
        if terminal and not quiet:
            show.hint(f"{TOY}: --model Qwen/Qwen3-0.6B, or whatever decoder of transformers it is to be")
    if (options.get("model") or kept.get("model")) == BUNDLED or not terminal:
        logging.disable_progress_bar()  # of loading weights
    return RAG.from_pretrained(path=folder, **{name: value for name, value in options.items() if value is not None})


def open_unwritten(folder: Path, **options: Any) -> RAG:
    """As :func:`open_rag`, but that nothing is made or written in the folder: one that is not there is taken for empty."""
    there = has_data(folder / "documents")
    return open_rag(folder if there else None, readonly=there, **options)


def options_of(args: argparse.Namespace, remote: object = None) -> dict[str, Any]:
    """What the options say of the model, of how it is asked and of where KV are kept, for :func:`open_rag`.

    Args:
        args: the options.
        remote: a pool in place of the one that they name.
    """
    return {
        **{name: getattr(args, name, None) for name in _ALIKE},
        "quiet": args.json,
        "gpu_bytes": args.gpu_size,
        "cpu_bytes": args.cpu_size,
        "disk_bytes": args.disk_size,
        "remote": pool_of(args) if remote is None else remote,
        "lifetime_s": args.lifetime,
        "paths": args.keeps_paths,
    }


def asking_options(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """As :func:`options_of`, for a question: a folder without documents of its own takes those that are published in the pool.

    Raises:
        RagKVError: there are no documents, and no pool.
    """
    if args.remote is None or (has_data(folder / "documents") and not _follows(folder, args.namespace)):
        require_documents(folder)
        return options_of(args)
    return {**options_of(args, pool_of(args, readonly=True)), "follow": True}


def _follows(folder: Path, namespace: str | None) -> bool:
    from ragkv.retrieval import Catalogue

    with Catalogue(folder / "documents") as catalogue:
        return bool(catalogue.seen(catalogue.defaults.get("namespace", "") if namespace is None else namespace).id)


def sent(store: TieredStore) -> None:
    """Wait until a shared pool has what was put, as long as something comes there; what is left is said, and sent another time."""
    left = _pending(store)
    while left:
        try:
            store.flush(_PATIENCE_S)
            return
        except UploadError as error:
            left, before = _pending(store), left
            if left >= before:
                show.hint(f"ragkv: {error}")
                return


def _pending(store: TieredStore) -> int:
    return sum(pool.pending for pool in store.stats().pools.values())


def require_documents(folder: Path) -> None:
    """Fail at once, before a model is loaded, where nothing was ever added.

    Raises:
        RagKVError: there is no such folder.
    """
    if not (folder / "documents").is_dir():
        raise RagKVError(
            f"no documents in {folder}: add some with 'ragkv add PATH...', or name another folder with --path"
        )
