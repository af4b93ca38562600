"""Finding passages by their words: BM25 over SQLite's full-text index (FTS5).

FTS5 and not a BM25 library in memory: passages are added and removed one by one, it lies on disk, several processes may use it,
and it comes with Python.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ragkv.errors import MissingPackageError
from ragkv.retrieval.snapshot import Snapshot

_LOG = logging.getLogger("ragkv.retrieval")

# passages: what FTS5 searches. known: of each passage, the digest of its text. meta: the catalogue's state.
_TABLES = """
CREATE VIRTUAL TABLE IF NOT EXISTS passages USING fts5(text, tokenize = 'porter unicode61 remove_diacritics 2');
CREATE TABLE IF NOT EXISTS known(id INTEGER PRIMARY KEY, digest BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
# Scripts without blanks between words: each character is a word.
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
_WORD = re.compile(r"\w+")
_MOST_WORDS = 256
# What a damaged file makes of an error's own text need not be text.
_DAMAGE = (sqlite3.Error, UnicodeDecodeError)
_WAIT_S = 600


class WordIndex:
    """The passages of a catalogue by their words, ranked by BM25. A copy: what is missing or damaged is made again.

    English endings are cut off (Porter), accents and case do not count. One thread at a time; several processes may have one
    file, and a forked child opens it anew.

    Args:
        path: the file, made if it is not there; ``None`` for memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._process = path, os.getpid()
        self._db: sqlite3.Connection | None = None
        self._inode = 0

    def search(self, view: Snapshot, query: str, k: int, among: Sequence[int] | None = None) -> list[int]:
        """The ids of at most ``k`` passages of a snapshot that have words of the query, best first.

        Args:
            view: the index is brought to its state before.
            query: any text.
            k: at least 1.
            among: ids of the passages that may be found; ``None`` for all.
        """
        try:
            return self._searched(view, query, k, among)
        except _DAMAGE as error:
            if self._path is None:
                raise
            _LOG.warning("the index of words is made again: %s: %s", self._path, error)
        self._drop()
        try:
            return self._searched(view, query, k, among)
        except _DAMAGE as error:
            _LOG.warning("the index of words is kept in memory: %s: %s", self._path, error)
        self.close()
        self._path = None
        return self._searched(view, query, k, among)

    def check(self) -> str:
        """What is wrong with the file, if anything is; the whole of it is read, and nothing is written.

        SQLite keeps no checksums: a search notices damage to the file's structure, and this also damage to what stands in it.
        """
        try:
            db = self._opened()
            (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if found == "ok":
                db.execute("INSERT INTO passages(passages) VALUES ('integrity-check')")
            return "" if found == "ok" else found
        except _DAMAGE as error:
            return str(error)
        finally:
            self.close()

    def close(self) -> None:
        """Closes the file. Closing twice is no error, and searching opens it again."""
        db, self._db = self._db, None
        if db is not None and self._process == os.getpid():
            with suppress(*_DAMAGE):
                db.close()

    def _searched(self, view: Snapshot, query: str, k: int, among: Sequence[int] | None) -> list[int]:
        words = list(dict.fromkeys(_WORD.findall(_spaced(query).lower())))[:_MOST_WORDS]
        if not words:
            return []
        db = self._opened()
        # One transaction: nobody brings the index to another state in between.
        db.execute("BEGIN")
        try:
            if _state(db) != view.state:
                db.execute("COMMIT")
                db.execute("BEGIN IMMEDIATE")
                _follow(db, view)
            filtered = "" if among is None else "AND rowid IN (SELECT value FROM json_each(?3)) "
            found = db.execute(
                f"SELECT rowid FROM passages WHERE passages MATCH ?1 {filtered}ORDER BY rank, rowid LIMIT ?2",
                (" OR ".join(f'"{word}"' for word in words), k, *([] if among is None else [json.dumps(list(among))])),
            ).fetchall()
            db.execute("COMMIT")
            if not all(view.has_passage(passage_id) for (passage_id,) in found):
                raise sqlite3.DatabaseError("it names a passage that there is not")
        except BaseException:
            with suppress(*_DAMAGE):
                db.execute("ROLLBACK")
            raise
        return [passage_id for (passage_id,) in found]

    def _opened(self) -> sqlite3.Connection:
        if self._process != os.getpid():  # a parent's connection is not to be used, nor closed
            self._inherited, self._db, self._process = self._db, None, os.getpid()
        if self._db is not None and self._path is not None and _inode(self._path) != self._inode:
            self.close()  # another process has made it again: what it was is nobody's any more
        if self._db is None:
            place = ":memory:" if self._path is None else self._path
            self._db = sqlite3.connect(place, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
            if self._path is not None:
                # Not WAL: that maps a file, and the system ends a process whose mapped file is cut short.
                self._db.execute("PRAGMA journal_mode = TRUNCATE")
                self._inode = _inode(self._path)
            try:
                self._db.executescript(_TABLES)
            except sqlite3.OperationalError as error:
                if "no such module" in str(error):
                    raise MissingPackageError(
                        "searching by words takes SQLite with FTS5, which this Python was built without: search with "
                        "hybrid=False, or take a Python whose sqlite3 has FTS5"
                    ) from error
                raise
        return self._db

    def _drop(self) -> None:
        self.close()
        assert self._path is not None
        for end in ("", "-journal"):
            with suppress(OSError):
                self._path.with_name(self._path.name + end).unlink()


def _inode(path: Path) -> int:
    """Which file is there; 0 for none."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _state(db: sqlite3.Connection) -> str:
    row = db.execute("SELECT value FROM meta WHERE name = 'state'").fetchone()
    return "" if row is None else row[0]


def _follow(db: sqlite3.Connection, view: Snapshot) -> None:
    """Brings the index to the state of a snapshot.

    Texts are compared, not ids alone: an older catalogue may have been put back, whose ids are of another history.
    """
    wanted, known = dict(view.text_digests()), dict(db.execute("SELECT id, digest FROM known"))
    gone = [(passage_id,) for passage_id, text in known.items() if wanted.get(passage_id) != text]
    new = [passage_id for passage_id, text in wanted.items() if known.get(passage_id) != text]
    db.executemany("DELETE FROM passages WHERE rowid = ?", gone)
    db.executemany("DELETE FROM known WHERE id = ?", gone)
    db.executemany(
        "INSERT INTO passages(rowid, text) VALUES (?, ?)", ((each, _spaced(view.passage_text(each))) for each in new)
    )
    db.executemany("INSERT INTO known VALUES (?, ?)", ((each, wanted[each]) for each in new))
    db.execute("INSERT OR REPLACE INTO meta VALUES ('state', ?)", (view.state,))


def _spaced(text: str) -> str:
    return _IDEOGRAPH.sub(r" \1 ", text)
