"""Opening the folder that a command works on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ragkv.errors import RagKVError
from ragkv.methods import Method
from ragkv.model.loading import BUNDLED
from ragkv.rag import RAG


def open_rag(
    folder: Path,
    *,
    model: str = BUNDLED,
    embedder: str | None = None,
    method: Method | None = None,
    foreign: str | None = None,
    **options: Any,
) -> RAG:
    """Load model and embedder and open a folder, which is made if it is not there.

    Args:
        folder: documents, vectors and KV.
        model: as for :meth:`RAG.from_pretrained`, like all the rest.
        embedder: see there.
        method: see there.
        foreign: see there.
        **options: others that it takes; ``None`` for its default.
    """
    from transformers.utils import logging

    if model == BUNDLED or not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading weights
    given = {name: value for name, value in options.items() if value is not None}
    return RAG.from_pretrained(model, path=folder, embedder=embedder, method=method, foreign=foreign, **given)


def storage(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say of the numbers of KV, and of where they are kept."""
    return {
        "gpu_bytes": args.gpu_size,
        "cpu_bytes": args.cpu_size,
        "disk_bytes": args.disk_size,
        "codec": args.codec,
        "cpu_codec": args.cpu_codec,
        "lifetime_s": args.lifetime,
        "dtype": args.dtype,
    }


def require_documents(folder: Path) -> None:
    """Fail at once, before a model is loaded, where nothing was ever added.

    Raises:
        RagKVError: there is no such folder.
    """
    if not (folder / "documents").is_dir():
        raise RagKVError(
            f"no documents in {folder}: add some with 'ragkv add PATH...', or name another folder with --path"
        )
