"""What components answer with: a folder that is opened when it is first needed, once for all components of a process."""

from __future__ import annotations

import asyncio
import json
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ragkv.engine import Engine
from ragkv.errors import ArgumentError, instance
from ragkv.folder.filesystem import folder_path
from ragkv.forks import ForkedLock
from ragkv.rag import RAG

_Key = tuple[str, str]


@dataclass
class _Shared:
    """A RAG, and how many hold it."""

    rag: RAG
    holders: int = 0


_opened: dict[_Key, _Shared] = {}
_lock = ForkedLock()


class Folder:
    """A folder of ragkv, or what was opened already.

    Args:
        rag: path of a folder, made if it is not there; or a RAG or an engine, which whoever made it closes.
        options: of :meth:`ragkv.RAG.from_pretrained`, for a folder; what JSON can hold.

    Raises:
        ArgumentTypeError: it is none of these.
        ArgumentError: options for what is open already, or that JSON cannot hold, or the path among them.
        StoreError: no folder can be called so.
    """

    def __init__(self, rag: RAG | Engine | str | os.PathLike[str], options: dict[str, Any] | None = None):
        must = "the path of a folder, or a ragkv.RAG or ragkv.Engine"
        instance("rag", rag, RAG | Engine | str | os.PathLike, must)
        instance("options", options, dict | None, "a dict")
        self._given, self._options = rag, dict(options or {})
        self._held: RAG | Engine | None = None
        self._release: Callable[[], object] | None = None
        if isinstance(rag, RAG | Engine):
            if options:
                raise ArgumentError(f"options {sorted(options)} are for a folder that is given by its path")
            self._held = rag
            return
        if "path" in self._options:
            raise ArgumentError("the path of the folder is rag, and no option")
        path = os.path.realpath(folder_path(rag))
        try:
            self._key = (path, json.dumps(self._options, sort_keys=True))
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"options must be what JSON can hold: {error}; or give a ragkv.RAG") from error

    def open(self) -> RAG | Engine:
        """What is in it; opened at the first call, and shared by all who give the same path and options.

        Raises:
            As :meth:`ragkv.RAG.from_pretrained`.
        """
        with _lock.held:
            if self._held is None:
                if self._key not in _opened:
                    _opened[self._key] = _Shared(RAG.from_pretrained(path=self._key[0], **self._options))
                shared = _opened[self._key]
                shared.holders += 1
                self._held = shared.rag
                self._release = weakref.finalize(self, _let_go, self._key)
            return self._held

    def close(self) -> None:
        """Let go of it: closed when nobody else holds it. A later :meth:`open` opens it again."""
        with _lock.held:
            if self._release is not None:
                self._release()
                self._release = self._held = None

    def to_dict(self) -> dict[str, Any]:
        """How it is written into a pipeline's file.

        Raises:
            ArgumentError: it is an object, which no file can hold.
        """
        if isinstance(self._given, RAG | Engine):
            raise ArgumentError(
                f"a {type(self._given).__name__} cannot be written into a file: give the path of its folder, rag='kv/'"
            )
        return {"rag": os.fspath(self._given), "options": dict(self._options)}


class OverFolder:
    """A component over a :class:`Folder`, which opens and closes with the pipeline."""

    _folder: Folder

    def warm_up(self) -> None:
        """Open the folder and load its model, if that is not done yet."""
        self._folder.open()

    async def warm_up_async(self) -> None:
        """:meth:`warm_up` in an event loop, which goes on meanwhile."""
        await asyncio.to_thread(self.warm_up)

    def close(self) -> None:
        """Close the folder, when no other component needs it."""
        self._folder.close()


def json_can_hold(value: Any) -> bool:
    """Whether a value can be written into a pipeline's file."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _let_go(key: _Key) -> None:
    with _lock.held:
        shared = _opened[key]
        shared.holders -= 1
        if not shared.holders:
            del _opened[key]
            shared.rag.close()
