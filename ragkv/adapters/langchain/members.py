"""LangChain's documents as passages of the folder's documents: which belong together, and where each stands, by its id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from langchain_core.documents import Document

from ragkv.adapters.parts import changing
from ragkv.engine import Engine
from ragkv.library.catalogued import CataloguedDocuments
from ragkv.retrieval import Catalogue, Change, Snapshot
from ragkv.retrieval import Document as Listed

#: What a document of the folder is called that is one document of LangChain, in front of its id.
ADDED = "langchain:"
#: And one that is made of several, in front of the source that their metadata say.
TOGETHER = "langchain-source:"
#: Where the latter's metadata keep ids and metadata of those, one a passage.
MEMBERS = "langchain_documents"

# Metadata that say where in its source a text stands, the coarsest first.
_PLACES = ("page", "page_number", "split_id", "start_index")


class Member(NamedTuple):
    """A document of LangChain."""

    text: str
    metadata: dict[str, Any]

    @property
    def place(self) -> tuple[int, ...]:
        """Where it stands in its source, to be compared; the least where that is not known."""
        return tuple(_number(self.metadata.get(name)) for name in _PLACES)

    def source(self, name: str) -> str:
        """What the folder's document is called that it belongs to: that of its source, where it says its place there."""
        source = self.metadata.get("source")
        known = isinstance(source, str) and source.strip() and max(self.place) >= 0
        return f"{TOGETHER}{source}" if known else f"{ADDED}{name}"


class Members:
    """Where the members of a catalogue's documents stand.

    Whoever changes several holds the catalogue's lock (:func:`~ragkv.adapters.parts.changing`) from looking to :meth:`follow`.

    Args:
        namespace: whose documents these are.
    """

    _all: WeakKeyDictionary[Catalogue, dict[str, Members]] = WeakKeyDictionary()

    def __init__(self, namespace: str):
        self._namespace = namespace
        self._places: dict[str, tuple[str, int]] = {}
        self._names: dict[str, list[str]] = {}
        self._state: str | None = None

    @classmethod
    def of(cls, catalogue: Catalogue, namespace: str) -> Members:
        """Those of a namespace."""
        return cls._all.setdefault(catalogue, {}).setdefault(namespace, cls(namespace))

    @contextmanager
    def view(self, catalogue: Catalogue) -> Iterator[Snapshot]:
        """The catalogue as it is now, and its lock.

        Args:
            catalogue: whose documents' members these are.
        """
        with changing(catalogue), catalogue.snapshot() as view:
            yield view

    def find(self, view: Snapshot, names: Iterable[str]) -> dict[str, tuple[Listed, int]]:
        """The document and the place in it of those ids that are there, in a :meth:`view`."""
        found: dict[str, tuple[Listed, int]] = {}
        self._look(view)
        for name in names:
            listed, place = view.get(f"{ADDED}{name}", self._namespace), 0
            if listed is None and name in self._places:
                source, place = self._places[name]
                listed = view.get(source, self._namespace)
            if listed is not None:
                found[name] = listed, place
        return found

    def read(self, view: Snapshot, source: str) -> dict[str, Member]:
        """The members of a document in order, by id; none where it is not there."""
        listed = view.get(source, self._namespace)
        if listed is None:
            return {}
        return {
            name: Member(text, metadata)
            for text, (name, metadata) in zip(view.texts(listed), _members(source, listed.metadata), strict=True)
        }

    def follow(self, change: Change, names: Iterable[str]) -> None:
        """A document has changed, and has these members now."""
        if self._state == change.states[0]:
            self._put(change.document.source, names)
            self._state = change.states[1]

    def _look(self, view: Snapshot) -> None:
        """Learns what there is, unless nothing has changed but what :meth:`follow` was told."""
        if self._state != view.state:
            self._places, self._names = {}, {}
            for listed in view.documents(self._namespace):
                if listed.source.startswith(TOGETHER):
                    self._put(listed.source, [name for name, _ in _members(listed.source, listed.metadata)])
            self._state = view.state

    def _put(self, source: str, names: Iterable[str]) -> None:
        for name in self._names.pop(source, ()):
            if self._places.get(name, ("",))[0] == source:  # else it has moved to another one
                del self._places[name]
        if source.startswith(TOGETHER):
            self._names[source] = list(names)
            self._places |= {name: (source, place) for place, name in enumerate(self._names[source])}


def kept(source: str, members: Mapping[str, Member]) -> dict[str, Any]:
    """The metadata that the folder keeps with a document: its only member's; or what all members' say, and each one's."""
    if not source.startswith(TOGETHER):
        return next(iter(members.values())).metadata
    first, *others = [member.metadata for member in members.values()]
    shared = {
        key: value for key, value in first.items() if all(key in other and other[key] == value for other in others)
    }
    return {**shared, MEMBERS: [{"id": name, "metadata": member.metadata} for name, member in members.items()]}


def as_added(source: str, metadata: dict[str, Any], position: int, text: str) -> Document:
    """A passage of a document as the document of LangChain that it was added as."""
    if not source.startswith(TOGETHER):
        return Document(id=source.removeprefix(ADDED), page_content=text, metadata=metadata)
    return Document(page_content=text, **metadata[MEMBERS][position])


def in_order(members: dict[str, Member]) -> dict[str, Member]:
    """Members of one source by where they stand in it.

    Where two say the same ``start_index``, on the same page, it was counted from something smaller than that, a section say:
    then it orders nothing, and they stay as they were added.
    """
    places = [member.place for member in members.values() if member.place[-1] >= 0]
    known = slice(None if len(set(places)) == len(places) else -1)
    return dict(sorted(members.items(), key=lambda item: item[1].place[known]))


def added_here(source: str) -> bool:
    """Whether a document of the folder is made of LangChain's."""
    return source.startswith((ADDED, TOGETHER))


def references(engine: Engine, namespace: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Where the documents of ids stand in a folder of an engine's, as :func:`ragkv.adapters.passages.reference` says it."""
    found: dict[str, dict[str, Any]] = {}
    names = list(names)
    for folder in engine.documents.records:
        if isinstance(folder, CataloguedDocuments) and names:
            catalogue = folder.retriever.catalogue
            members = Members.of(catalogue, namespace)
            with members.view(catalogue) as view:
                at = members.find(view, names)
            found |= {name: {"document": listed.id, "passage": place} for name, (listed, place) in at.items()}
    return found


def _members(source: str, metadata: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Ids and metadata of the members of a document, by what it is called and its own metadata."""
    if source.startswith(TOGETHER):
        return [(member["id"], member["metadata"]) for member in metadata[MEMBERS]]
    return [(source.removeprefix(ADDED), metadata)]


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else -1
