"""The entries of a store beside the documents that they belong to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragkv.cli import show
from ragkv.errors import RagKVError
from ragkv.exchange import kv_folder
from ragkv.folder.filesystem import has_data
from ragkv.retrieval import Catalogue
from ragkv.store.keys import ANY, PATH, tag
from ragkv.store.maintenance import Entry, entries, remove

#: What lists the documents.
DOCS = "'ragkv docs'"

_SHORT = 12
# So many entries that are to be removed are shown.
_SHOWN = 20


@dataclass(frozen=True)
class Listed:
    """An entry, and where its passage stands.

    Attributes:
        entry: what the store says.
        places: source and position from 0 of every passage that it is read for, or was computed of and behind; none where no
            document has it.
        catalogued: whether there are documents at all.
        now: the wall clock in seconds, by which it is aged.
    """

    entry: Entry
    places: tuple[tuple[str, int], ...]
    catalogued: bool
    now: float

    @property
    def id(self) -> str:
        """Its key, as 64 digits."""
        return self.entry.key.hex()

    @property
    def orphan(self) -> bool:
        """Whether it was made for a document's passage, and no document has that any more."""
        return self.catalogued and self.entry.label not in ("", ANY) and not self.places

    def field(self, name: str) -> Any:
        """What filters and orders look at, see :data:`ragkv.cli.filters.FIELDS`."""
        entry = self.entry
        match name:
            case "size":
                return entry.size_bytes
            case "age":
                return max(self.now - entry.created_s, 0.0)
            case "idle":
                return max(self.now - entry.used_s, 0.0)
            case "cost":
                return entry.cost_s
            case "document":
                return show.short(self.places[0][0]) if self.places else ""
            case "id":
                return self.id
            case "codec" | "space":
                return getattr(entry, name) or ""
            case _:
                return getattr(entry, name)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        entry = self.entry
        return {
            "id": self.id,
            "places": [{"source": source, "position": position} for source, position in self.places],
            "orphan": self.orphan,
            "tier": "disk",
            "bytes": entry.size_bytes,
            "tokens": entry.tokens,
            "codec": entry.codec,
            "space": entry.space,
            "hits": entry.hits,
            "cost_s": entry.cost_s,
            "created_s": entry.created_s,
            "used_s": entry.used_s,
            "expires_s": None if entry.expires_s == math.inf else entry.expires_s,
            "pinned": entry.pinned,
        }


def store_folder(path: Path) -> Path:
    """The folder of KV in a folder of documents, or the folder itself where it is one of KV alone.

    Raises:
        RagKVError: there is neither.
    """
    folder = kv_folder(path)
    if has_data(folder):
        return folder
    raise RagKVError(
        f"no stored KV in {path}: add documents with 'ragkv add PATH...', or name another folder with --path"
    )


def listed(path: Path, *, passing_over: bool = False) -> list[Listed]:
    """All entries, by document and passage; what belongs to none comes last.

    Args:
        path: the folder.
        passing_over: go on where a document is damaged, as if it were not there.

    Raises:
        RecordError: a document is damaged.
    """
    stored = list(entries(store_folder(path)))  # first: what is read for a document is stored behind it
    places = _places(path / "documents", passing_over)
    catalogued, now = has_data(path / "documents"), time.time()
    tagged: dict[str, list[tuple[str, int]]] = {}
    for key, these in places.items():
        tagged.setdefault(tag(key), []).extend(these)

    def places_of(entry: Entry) -> tuple[tuple[str, int], ...]:
        if not entry.key.startswith(PATH):
            return tuple(places.get(entry.key, ()))
        return tuple(place for name in reversed(entry.label.split()) for place in tagged.get(name, ()))

    found = [Listed(entry, places_of(entry), catalogued, now) for entry in stored]
    return sorted(found, key=lambda item: (not item.places, item.places, item.id))


def removed(
    path: Path,
    chosen: Sequence[Listed],
    documents: Sequence[str] = (),
    *,
    ask: bool,
    dry_run: bool,
    as_json: bool,
    behind: Callable[[], None] = lambda: None,
) -> int:
    """Shows what is to be removed, asks, removes it, and says so; the exit code.

    Args:
        path: the folder.
        chosen: entries to remove.
        documents: documents that ``behind`` removes too, and which the caller has shown.
        ask: unless the answer is yes, nothing is removed.
        dry_run: remove nothing.
        as_json: say so for programs.
        behind: called behind the removal of the entries, before it is said.
    """
    size = sum(item.entry.size_bytes for item in chosen)
    amount = f"{show.number(len(chosen), 'entry', 'entries')}, {show.size(size)}"
    if documents:
        amount = f"{show.number(len(documents), 'document')}, {amount}"
    if not as_json and chosen and not documents:
        table(chosen[:_SHOWN])
        if len(chosen) > _SHOWN:
            print(f"... and {show.number(len(chosen) - _SHOWN, 'other')}")
    if (chosen or documents) and not dry_run:
        if ask and not show.confirmed(f"Remove {amount}?"):
            show.hint("ragkv: nothing was removed; --yes removes without asking")
            return 1
        with show.progress(unit=" entries", total=len(chosen)) as bar:
            if chosen:
                remove(store_folder(path), [item.entry.key for item in chosen])
            bar.update(len(chosen))
        behind()
    if as_json:
        ids = [item.id for item in chosen]
        said = {"path": str(path), "dry_run": dry_run, "removed": ids, "bytes": size}
        show.as_json({**said, "documents": list(documents)} if documents else said)
    else:
        print(f"would remove {amount}" if dry_run else f"removed {amount}")
    return 0


def table(items: Iterable[Listed]) -> None:
    """Prints entries, one a line."""
    rows = [("id", "document", "passage", "tokens", "size", "tier", "codec", "age", "idle", "hits", "")]
    for item in items:
        source, position = item.places[0] if item.places else ("", -1)
        entry = item.entry
        rows.append(
            (
                item.id[:_SHORT],
                show.short(source) or ("(orphan)" if item.orphan else "(none)"),
                str(position + 1) if item.places else "",
                f"{entry.tokens:,}",
                show.size(entry.size_bytes),
                "disk",
                entry.codec or "damaged",
                show.duration(item.field("age")),
                show.duration(item.field("idle")),
                f"{entry.hits:,}",
                "pinned" if entry.pinned else "path" if entry.key.startswith(PATH) else "",
            )
        )
    show.table(rows, left=2)


def _places(folder: Path, passing_over: bool) -> dict[bytes, list[tuple[str, int]]]:
    """Where the passages stand that each entry is read for, by its key."""
    places: dict[bytes, list[tuple[str, int]]] = {}
    if not has_data(folder):
        return places
    with Catalogue(folder) as catalogue, catalogue.snapshot() as view:
        documents = view.documents(damaged=(lambda document_id, error: None) if passing_over else None)
        for document in sorted(documents, key=lambda document: document.source):
            for reading in view.readings(document):
                for position, key in enumerate(reading.keys):
                    places.setdefault(key, []).append((document.source, position))
    return places
