"""``ragkv add --ray``: the machines of a cluster read the files into the pool, from which they are added here."""

from __future__ import annotations

import argparse
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ragkv.cli import show
from ragkv.cli.opening import options_of
from ragkv.cli.pools import pool_for_many
from ragkv.cli.reading import reading
from ragkv.errors import ArgumentError, RagKVError
from ragkv.library.done import Added

if TYPE_CHECKING:
    from ragkv.distributed import Precomputed

_QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0"}
_PATIENCE_S = 10.0
# Options of the command that say nothing of how documents are read.
_NOT_THERE = {"gpu_bytes", "disk_bytes", "quiet", "paths", "cpu_codec"}


def check(args: argparse.Namespace) -> None:
    """Refuse what a cluster cannot do, before anything is loaded.

    Raises:
        ArgumentError: there is no pool, nothing is to be done, or there is no cluster to do it.
    """
    if args.ray is None:
        if args.workers is not None:
            raise ArgumentError("--workers are those of a cluster: give --ray ADDRESS, too")
        return
    if "://" in args.ray:
        raise ArgumentError(
            f"--ray takes HOST:PORT, auto or local, got {args.ray}: run the command on a machine of the cluster, not "
            "through Ray's client"
        )
    if args.remote is None:
        raise ArgumentError(
            "--ray needs --remote URL, as s3://BUCKET/PREFIX: what the workers compute comes here through a pool that all "
            "machines reach"
        )
    if args.dry_run:
        raise ArgumentError("--ray computes, and --dry-run does nothing: leave one of them out")


def precomputed(args: argparse.Namespace, path: Path) -> Precomputed:
    """Have the cluster read the files.

    Raises:
        ArgumentError: the cluster computes on GPUs, and this machine does not: it would not find what they compute.
        RagKVError: there is no cluster at this address; and as :func:`ragkv.distributed.precompute`.
    """
    from ragkv.defaults import kept_in
    from ragkv.distributed import precompute
    from ragkv.model.loading import BUNDLED

    kept = kept_in(path)
    options = {
        name: value
        for name, value in options_of(args, pool_for_many(args)).items()
        if name not in _NOT_THERE and value is not None
    }
    if "model" not in kept:
        options.setdefault("model", BUNDLED)
    packed = "weights" in options or "weights" in kept
    with _connected(args.ray), reading(args, "reading on the cluster") as bar:
        options["device"] = _device(args.ray, packed)
        return precompute(args.paths, path=path, workers=args.workers, encoding=args.encoding, progress=bar, **options)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connected to a cluster, of whose doings only what is lost is heard."""
    from ragkv.distributed.cluster import needed

    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)  # heard by each process of Ray's; who has set them is heeded
    ray = needed()
    try:
        host, _, port = address.rpartition(":")
        if host:  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_S).close()
        own = {"include_dashboard": False} if address == "local" else {}
        ray.init(address, log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise RagKVError(f"no Ray cluster answers at {address}: {error}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _device(address: str, packed: bool) -> str:
    """What workers are to compute on: this machine's device, or what they compute is not found here."""
    import torch

    from ragkv.distributed.cluster import nodes

    if packed:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if any(node.get("GPU") for node in nodes()):
        raise ArgumentError(
            f"the cluster at {address} has GPUs, and this machine has none: it would not find what they compute. Run this on a "
            "machine with a GPU, as those have that are to answer"
        )
    return "cpu"


def tell(before: Precomputed, added: Added, setting: str) -> None:
    """Say how the cluster fared: what failed there, and whether this machine finds what was computed."""
    here = {skipped.source for skipped in added.skipped}
    for source, reason in before.failed.items():
        if source not in here:
            show.hint(f"not read on the cluster but here: {show.short(source)}: {reason}")
    if before.setting and before.setting != setting:
        show.hint(
            "ragkv: the cluster's workers do not read as this machine does: their model, dtype, device or version differs, and "
            "what they computed is not found here"
        )
