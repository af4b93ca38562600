"""The folder of a catalogue: one LMDB environment, and what it says of itself."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from ragkv.errors import IncompatibleFolderError, RetrievalError
from ragkv.folder import Environment
from ragkv.folder.filesystem import folder_path
from ragkv.retrieval.snapshot import Snapshot
from ragkv.retrieval.upkeep import bring_up

# documents: source key -> document. passages: id -> source key and text. vectors: id -> vector.
# uses: text key -> the ids of its passages. readings: source key, setting -> how a model reads the document.
# kv: key of KV, or of a passage in front of a document -> the keys of the readings that name it.
# meta: format, settings, defaults, state, next id, what came from publications.
DATABASES: dict[bytes, dict[str, Any]] = {
    b"meta": {},
    b"documents": {},
    b"passages": {},
    b"vectors": {},
    b"uses": {"dupsort": True, "dupfixed": True},
    b"readings": {},
    b"kv": {"dupsort": True, "dupfixed": True},
}


class CatalogueFolder:
    """Opened, closed, and held to what it was made with. See :class:`~ragkv.retrieval.Catalogue`."""

    def __init__(self, path: str | os.PathLike[str] | None = None, *, readonly: bool = False) -> None:
        self.temporary: bool = path is None
        self.path: Path = folder_path(tempfile.mkdtemp(prefix="ragkv-") if path is None else path)
        only_reading = readonly and not self.temporary
        self._opened = Environment.open(self.path, DATABASES, durable=not self.temporary, readonly=only_reading)
        self._give_back = weakref.finalize(self, _give_back, self._opened, self.temporary, os.getpid())
        try:
            bring_up(self._environment, self.readonly)
        except BaseException:
            self.close()
            raise

    @property
    def readonly(self) -> bool:
        """Whether the folder may not be written to."""
        return self._environment.readonly

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Everything as it is now, whatever is written meanwhile. To be left soon: it keeps deleted pages alive."""
        with self._environment.transaction() as txn:
            yield Snapshot(txn)

    def require(self, what: str, fingerprint: str, name: str = "") -> None:
        """States what the folder is made with, or checks that it was made with just that.

        While the folder has no documents, the last statement counts.

        Args:
            what: a word for it: ``"embedder"``.
            fingerprint: equal exactly when the folder can be used.
            name: what people call it.

        Raises:
            IncompatibleFolderError: the folder was made with another one.
        """
        given = {"fingerprint": fingerprint, "name": name}
        if self.settings.get(what, {}).get("fingerprint") == fingerprint:
            return
        with self._environment.transaction(write=True) as txn:
            view = Snapshot(txn)
            stored = view.settings.get(what)
            if stored and stored["fingerprint"] != fingerprint and len(view):
                raise IncompatibleFolderError(
                    f"{self.path} was made with the {what} {_spoken(stored)}, got {_spoken(given)}: open it with the "
                    f"former, or add the documents to another folder"
                )
            txn.put("meta", b"settings", json.dumps({**view.settings, what: given}).encode())

    @property
    def settings(self) -> dict[str, dict[str, str]]:
        """What the folder was made with: ``{what: {"fingerprint": ..., "name": ...}}``."""
        with self.snapshot() as view:
            return view.settings

    @property
    def defaults(self) -> dict[str, Any]:
        """What the folder is opened with where nothing else is said: whatever :meth:`keep_defaults` was given last."""
        with self.snapshot() as view:
            return view.defaults

    def keep_defaults(self, defaults: dict[str, Any]) -> None:
        """Keeps what JSON can hold, in the place of what was kept before."""
        if defaults != self.defaults:
            self._keep(b"defaults", defaults)

    @property
    def read_with(self) -> dict[str, str]:
        """What documents were last read with, by name; see :meth:`keep_read_with`."""
        with self.snapshot() as view:
            return view.read_with

    def keep_read_with(self, described: dict[str, str]) -> None:
        """Keeps what documents are read with, to name what differs later; in the place of what was kept before."""
        if described != self.read_with:
            self._keep(b"read with", described)

    def structure(self) -> list[str]:
        """What is wrong with the file's own pages, a line each; writers wait meanwhile."""
        return self._environment.problems()

    def close(self) -> None:
        """Closes the folder, and deletes it where it is a temporary one. Closing twice is no error."""
        self._give_back()

    def _keep(self, name: bytes, facts: dict[str, Any]) -> None:
        with self._environment.transaction(write=True) as txn:
            txn.put("meta", name, json.dumps(facts).encode())

    @property
    def _environment(self) -> Environment:
        if not self._give_back.alive:
            raise RetrievalError(f"{self.path} is closed: open it again")
        return self._opened

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _spoken(setting: dict[str, str]) -> str:
    return " ".join(part for part in (setting["name"], f"({setting['fingerprint']})") if part)


def _give_back(environment: Environment, temporary: bool, process: int) -> None:
    environment.close()
    # A forked child has its parent's folder, which is not its own to delete.
    if temporary and os.getpid() == process:
        shutil.rmtree(environment.path, ignore_errors=True)
