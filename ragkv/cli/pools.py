"""--remote and --remote-key-file: the pool that a command works with, and the keys that it is encrypted with."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ragkv.errors import ArgumentError

if TYPE_CHECKING:
    from ragkv.store import RemoteTier

#: Holds what a key file holds.
VARIABLE = "RAGKV_REMOTE_KEY"

_FORM = (
    "64 hexadecimal digits, as `openssl rand -hex 32` writes them; or, with a key for each namespace, a JSON object of such "
    '("" for what is of none)'
)


def add_key_option(options: argparse._ActionsContainer) -> None:
    """What tells the keys of a pool: a file, so that no list of processes and no shell's history shows them."""
    options.add_argument(
        "--remote-key-file",
        type=Path,
        metavar="FILE",
        help=f"what the pool is encrypted with: 64 hexadecimal digits, or JSON with a key for each namespace (or {VARIABLE})",
    )


def pool_of(args: argparse.Namespace, readonly: bool = False) -> str | RemoteTier | None:
    """The pool of a command: its URL, or an encrypted one, opened.

    Args:
        args: with ``remote`` and ``remote_key_file``.
        readonly: it is only to be read.

    Raises:
        ArgumentError: a key and no pool, or what is given is no key.
        StoreError, MissingPackageError: as :class:`~ragkv.store.RemoteTier`.
    """
    pool = pool_for_many(args)
    return pool(readonly=readonly) if isinstance(pool, partial) else pool


def opened_pool(args: argparse.Namespace) -> RemoteTier | None:
    """As :func:`pool_of`, opened in any case."""
    from ragkv.store import RemoteTier

    pool = pool_of(args)
    return RemoteTier(pool) if isinstance(pool, str) else pool


def pool_for_many(args: argparse.Namespace) -> str | partial[RemoteTier] | None:
    """As :func:`pool_of`, but that each process opens an encrypted one for itself."""
    text = _given(args)
    if text is None:
        return args.remote
    from ragkv.store import RemoteTier

    return partial(RemoteTier, args.remote, encryption_key=_key(args.remote_key_file or VARIABLE, text))


def _given(args: argparse.Namespace) -> str | None:
    file: Path | None = args.remote_key_file
    if file is None:
        return (os.environ.get(VARIABLE) or None) if args.remote is not None else None
    if args.remote is None:
        raise ArgumentError("--remote-key-file is of a pool: give --remote URL, too")
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ArgumentError(f"--remote-key-file {file}: {error.strerror}") from error


def _key(where: Path | str, text: str) -> bytes | dict[str, bytes]:
    """A key, or keys by their namespaces; what is wrong is not shown."""
    each = text.lstrip().startswith("{")
    try:
        given = json.loads(text) if each else {"": text.strip()}
        keys = {namespace: bytes.fromhex(digits) for namespace, digits in given.items()}
        if not keys or any(len(key) != 32 for key in keys.values()):
            raise ValueError
    except (ValueError, TypeError):
        raise ArgumentError(f"{where} holds no key: it must be {_FORM}") from None
    return keys if each else keys[""]
