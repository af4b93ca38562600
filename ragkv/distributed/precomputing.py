"""Documents in, KV into a shared pool: what is said before, and the account afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ragkv.defaults import kept_in
from ragkv.distributed import cluster
from ragkv.distributed.batches import batches
from ragkv.distributed.results import Precomputed, gathered
from ragkv.distributed.worker import Worker
from ragkv.errors import ArgumentError, DocumentError, instance, whole_number
from ragkv.library.watching import Progress, Tell, check_told
from ragkv.opening import settled
from ragkv.retrieval import SkippedFile
from ragkv.retrieval.encodings import checked_encoding
from ragkv.retrieval.loaders import found_files
from ragkv.store.remote import RemoteTier

if TYPE_CHECKING:
    from ray.data import Dataset

# The options of RAG.from_pretrained that say how documents are read, besides the model's own.
_OF_READING = frozenset(
    (
        *("model", "tokenizer", "chunk_tokens", "method", "template", "system", "foreign", "device", "codec"),
        *("namespace", "lifetime_s", "context", "document_tokens", "piece_tokens", "sensitivity", "kernels", "behind"),
        "embedder",  # a folder keeps it too; it says nothing of reading
    )
)
_COLUMNS = "a ray.data.Dataset has a column text, or the columns path and bytes (ray.data.read_binary_files)"


def precompute(
    documents: Dataset | str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    model: str | os.PathLike[str] | None = None,
    *,
    remote: str | Callable[[], RemoteTier],
    path: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    cpu_bytes: int = 4 << 30,
    batch_bytes: int = 128 << 10,
    upload_s: float = 600.0,
    encoding: str | None = None,
    progress: Tell | None = None,
    **options: Any,
) -> Precomputed:
    """Have the machines of a Ray cluster read documents, and leave their KV in a shared pool.

    Whoever adds the same documents with the same options afterwards (:meth:`ragkv.RAG.add_files`, with ``remote=``) computes
    nothing. What the pool has already is not computed: a run that was cut short goes on where it was. A document that cannot be
    read is named in the report, and the others are read. The cluster is the one that ``ray.init()`` has connected to,
    or that it finds by itself.

    Args:
        documents: files, and folders with all that is in them, read where this is called; or a ``ray.data.Dataset`` of rows with
            ``text``, and ``source`` for the document's name; or with ``path`` and ``bytes``, as ``ray.data.read_binary_files``
            gives them. A block of it is handed to one worker.
        model: as for :meth:`ragkv.RAG.from_pretrained`; a path must lead to it on every machine.
        remote: the pool's URL, which every machine must be able to reach; or a function that makes a
            :class:`~ragkv.store.remote.RemoteTier` with an encryption key, say: it is called in every worker.
        path: a folder of documents: what it was made with holds where nothing else is said.
        workers: how many; by default as many as the cluster has room for now.
        cpus, gpus: of each worker, by Ray's count; by default one GPU and one CPU, and without GPUs four CPUs.
        cpu_bytes: memory in each worker for KV that wait to be sent.
        batch_bytes: of the files that are read before the pool is waited for. When a worker dies, what of these were read is
            looked up again, and the rest is read again.
        upload_s: how long the pool is waited for when it takes nothing; then reading ends.
        encoding: of text files, as for :meth:`ragkv.RAG.add_files`.
        progress: called behind each document, in the place of Ray Data's own bar.
        **options: more of :meth:`ragkv.RAG.from_pretrained`: those that say how documents are read.

    Raises:
        MissingPackageError: Ray is not installed.
        ArgumentError: documents are read behind their neighbours (``behind``), which nobody knows yet; or the cluster has no room
            for a worker.
        DocumentError: ``documents`` are none.
        UploadError: the pool takes nothing. What was sent is there.
        RagKVError: as :meth:`ragkv.RAG.from_pretrained`, from a worker; workers do not read alike.
    """
    ray = cluster.needed()
    instance(
        "remote",
        remote,
        str | Callable,
        "the URL of a pool, as 's3://bucket/prefix', or a function that makes a RemoteTier",
    )
    for name, number in {"batch_bytes": batch_bytes, "cpu_bytes": cpu_bytes, "workers": workers}.items():
        if number is not None:
            whole_number(name, number, 1)
    for name, amount in {"cpus": cpus, "gpus": gpus, "upload_s": upload_s}.items():
        instance(name, amount, int | float | None, "a number")
        if amount is not None and amount < 0:
            raise ArgumentError(f"{name} must be >= 0, got {amount}")
    check_told(progress)
    checked_encoding(encoding)
    given = settled({**options, "model": model}, _OF_READING, kept_in(None if path is None else Path(path)))
    for name in given.keys() & {"model", "tokenizer"}:
        given[name] = _placed(given[name])
    if given.get("behind"):
        raise ArgumentError(
            f"behind={given['behind']}: documents are read behind their neighbours, which are known when all of them "
            "are added; they cannot be read before"
        )
    files, unread, work = list[str](), dict[str, str](), cast(Any, documents)
    rows = isinstance(documents, ray.data.Dataset)
    if rows:
        _check_columns(work.columns() or [])
    else:
        files, sizes, unread = _files(documents)
        if not files:
            return gathered((), unread)
        work = [[files[number] for number in batch] for batch in batches(sizes, batch_bytes)]
    if not ray.is_initialized():
        ray.init()
    share = cluster.share(cluster.nodes(), workers, cpus, gpus, given.get("device"), spare_cpus=int(rows))
    if not rows:
        share = share._replace(workers=min(share.workers, len(work)))
    given["device"] = given.get("device") or ("cuda" if share.gpus else "cpu")
    make = partial(
        Worker, given, remote, cpu_bytes=cpu_bytes, batch_bytes=batch_bytes, upload_s=upload_s, encoding=encoding
    )

    def tell(source: str, done: int) -> None:
        if progress is not None:
            progress(Progress(source, "found", 0, 0, done_documents=done, documents=max(len(files), done)))

    return gathered(cluster.read(work, make, share, bar=progress is None), unread, tell)


def _placed(value: Any) -> Any:
    """The path of a model, or of a tokenizer, as it is found from anywhere: workers stand in other folders."""
    return os.path.abspath(value) if isinstance(value, str | os.PathLike) and os.path.isdir(value) else value


def _files(paths: Any) -> tuple[list[str], list[int], dict[str, str]]:
    """Files and their sizes, and why others cannot be read."""
    names, sizes, unread = list[str](), list[int](), dict[str, str]()
    for found in found_files(paths):
        if isinstance(found, SkippedFile):
            unread[found.source] = found.reason
            continue
        try:
            names.append(found.encode().decode())
            sizes.append(os.path.getsize(found))
        except UnicodeEncodeError:
            unread[found] = "its name is not valid Unicode"
        except OSError:  # whoever reads it says why it cannot be
            sizes.append(0)
    return names, sizes, unread


def _check_columns(columns: Iterable[str]) -> None:
    there = set(columns)
    if "text" not in there and not {"path", "bytes"} <= there:
        raise DocumentError(f"{_COLUMNS}, and source for a name; got {sorted(there)}")
