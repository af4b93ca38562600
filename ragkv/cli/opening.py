"""Opening the folder that a command works on."""

from __future__ import annotations

import sys
from pathlib import Path

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
) -> RAG:
    """Load model and embedder and open a folder, which is made if it is not there."""
    from transformers.utils import logging

    if model == BUNDLED or not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading weights
    return RAG.from_pretrained(model, path=folder, embedder=embedder, method=method, foreign=foreign)


def require_documents(folder: Path) -> None:
    """Fail at once, before a model is loaded, where nothing was ever added.

    Raises:
        RagKVError: there is no such folder.
    """
    if not (folder / "documents").is_dir():
        raise RagKVError(
            f"no documents in {folder}: add some with 'ragkv add PATH...', or name another folder with --path"
        )
