"""Opening the folder that a command works on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkv.errors import RagKVError

if TYPE_CHECKING:
    from ragkv.rag import RAG

# Options of the command line that are called as in Python.
_ALIKE = (
    *(
        "model",
        "tokenizer",
        "dtype",
        "weights",
        "revision",
        "subfolder",
        "gguf_file",
        "system",
        "namespace",
        "embedder",
        "foreign",
    ),
    *("cache_dir", "local_files_only", "trust_remote_code", "method", "chunk_tokens", "codec", "cpu_codec"),
)


def open_rag(folder: Path, **options: Any) -> RAG:
    """Load model and embedder and open a folder, which is made if it is not there.

    Args:
        folder: documents, vectors and KV.
        **options: of :meth:`RAG.from_pretrained`; ``None`` for the folder's own, or its default.
    """
    from transformers.utils import logging

    from ragkv.defaults import kept_in
    from ragkv.model.loading import BUNDLED
    from ragkv.rag import RAG

    model = options.get("model") or kept_in(folder).get("model", BUNDLED)
    if model == BUNDLED or not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading weights
    return RAG.from_pretrained(path=folder, **{name: value for name, value in options.items() if value is not None})


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say of the model, of how it is asked and of where KV are kept, for :func:`open_rag`."""
    return {
        **{name: getattr(args, name, None) for name in _ALIKE},
        "gpu_bytes": args.gpu_size,
        "cpu_bytes": args.cpu_size,
        "disk_bytes": args.disk_size,
        "lifetime_s": args.lifetime,
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
