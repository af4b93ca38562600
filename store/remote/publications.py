"""What documents there are, in a shared pool: an object for each namespace and setting, put in the place of the one before, whole.

    header    length of the facts u32 | facts, JSON | of each part: name 32, length u64, checksum (xxh3_64) u64
    segments  the parts, in order

It is an object as chunks are (:mod:`ragkv.store.remote.envelope`), encrypted in the same way, so that single parts can be read. The
part of the name :data:`KEYS` lists the keys of the KV that the documents need; what else there is this module does not look into.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import xxhash

from ragkv.chunk import digest
from ragkv.errors import PublicationError, RecordError
from ragkv.store.remote.ciphers import TAG_BYTES
from ragkv.store.remote.envelope import ID, MOST_HEADER_BYTES, Envelope, Head
from ragkv.store.remote.pool import Pool
from ragkv.store.rows import namespace_id

#: The part that lists the keys of KV, 32 bytes each.
KEYS = bytes(32)

_FOLDER = "catalogues/"
_LENGTH, _PART = struct.Struct("<I"), struct.Struct("<32sQQ")
_HEAD_BYTES = 64 << 10
_RANGE_BYTES, _GAP_BYTES = 8 << 20, 64 << 10
_TRIES = 3


class Part(NamedTuple):
    """Where a part stands in its publication.

    Attributes:
        number: among the parts.
        span: its first byte among those of all parts, and the one behind its last.
        checksum: of its name and its bytes.
    """

    number: int
    span: tuple[int, int]
    checksum: bytes


class Publication(NamedTuple):
    """A published catalogue, whose parts are not read yet.

    Attributes:
        name: of the object.
        facts: what whoever published it says of it.
        parts: by name.
        head: of the object.
    """

    name: str
    facts: dict[str, Any]
    parts: dict[bytes, Part]
    head: Head


class _ReplacedError(Exception):
    """Another publication has come in the place of one that was read."""


class Publications:
    """The published catalogues of a pool. What the pool does not do is a :class:`~ragkv.store.remote.pool.PoolError`.

    Args:
        pool: where they are.
        envelope: seals and opens them.

    Attributes:
        place: where that is, without secrets.
    """

    def __init__(self, pool: Pool, envelope: Envelope) -> None:
        self.place: str = pool.name
        self._pool, self._envelope = pool, envelope

    def put(self, namespace: str, setting: str, facts: Mapping[str, Any], parts: Mapping[bytes, bytes]) -> int:
        """Publishes, in the place of what was published of namespace and setting before; its bytes.

        Raises:
            PublicationError: it is too large for the pool. What was published before stays.
        """
        said = json.dumps(dict(facts), ensure_ascii=False).encode()
        table = [_PART.pack(name, len(data), _checksum(name, data)) for name, data in parts.items()]
        header = b"".join((_LENGTH.pack(len(said)), said, *table))
        if len(header) + TAG_BYTES > MOST_HEADER_BYTES:
            raise PublicationError(
                f"{len(parts) - 1:,} documents are too many to publish at once: use several namespaces"
            )
        name = _name(namespace, setting)
        data = self._envelope.seal_pieces(_key(name), header, list(parts.values()), namespace_id(namespace))
        if len(data) > self._pool.most_bytes:
            raise PublicationError(
                f"the catalogue is not published: it has {len(data):,} bytes, and {self._pool.name} takes values of "
                f"{self._pool.most_bytes:,}; use an object store, or several namespaces"
            )
        self._pool.write(name, data, float("inf"))
        return len(data)

    def withdraw(self, namespace: str, other_than: str) -> int:
        """Deletes what is published of a namespace in any other setting; how many there were."""
        names = [name for name in self._names(_folder(namespace)) if name != _name(namespace, other_than)]
        for name in names:
            self._pool.delete(name)
        return len(names)

    def id(self, namespace: str, setting: str) -> bytes:
        """Differs between any two publications; empty where there is none."""
        head = self._pool.read(_name(namespace, setting), 0, ID.stop)
        return b"" if head is None else bytes(head)[ID]

    def get(self, namespace: str, setting: str) -> Publication | None:
        """What is published of a namespace and setting; None where nothing is.

        Raises:
            RecordError: it is damaged.
            ForeignError: it is of another version of the pool's format, or not encrypted with this key.
        """
        return self._get(_name(namespace, setting), namespace)

    def each(self, namespace: str | None = None) -> list[Publication]:
        """All that is published, of one namespace or of all.

        Raises:
            RecordError, ForeignError: see :meth:`get`.
        """
        names = self._names(_FOLDER if namespace is None else _folder(namespace))
        found = [self._get(name, namespace) for name in names]
        return [publication for publication in found if publication is not None]

    def take(
        self, namespace: str, setting: str, wanted: Callable[[Publication], Iterable[bytes]]
    ) -> tuple[Publication, dict[bytes, bytes]] | None:
        """A publication, and those of its parts that are wanted of it, all of one moment; None where there is none.

        Raises:
            PublicationError: it is replaced again and again while it is read.
            RecordError, ForeignError: see :meth:`get`.
        """
        return self._take(_name(namespace, setting), namespace, wanted)

    def keys(self) -> set[bytes]:
        """The keys of all KV that a published catalogue needs, of whatever namespace.

        Raises:
            PublicationError: nothing is published; or as :meth:`take`.
            RecordError, ForeignError: one cannot be read, so that nobody knows what it needs.
        """
        needed: set[bytes] = set()
        names = self._names(_FOLDER)
        for name in names:
            taken = self._take(name, None, lambda found: [KEYS])
            listed = b"" if taken is None else taken[1][KEYS]
            needed.update(listed[at : at + 32] for at in range(0, len(listed), 32))
        if not names:
            raise PublicationError(f"nothing is published in {self._pool.name}, so that nobody knows what is needed")
        return needed

    def ids(self) -> set[tuple[str, bytes]]:
        """Names and ids of all that is published, without a look into it: equal as long as nothing is published."""
        heads = self._pool.heads(self._names(_FOLDER), ID.stop)
        return {(name, bytes(head)[ID]) for name, head in heads.items()}

    def _names(self, below: str) -> list[str]:
        return sorted({name for name, _ in self._pool.names(below) if _is_ours(name)})

    def _take(
        self, name: str, namespace: str | None, wanted: Callable[[Publication], Iterable[bytes]]
    ) -> tuple[Publication, dict[bytes, bytes]] | None:
        for _ in range(_TRIES):
            found = self._get(name, namespace)
            if found is None:
                return None
            try:
                return found, self._read(found, wanted(found))
            except _ReplacedError:
                continue
        raise PublicationError(f"the catalogue {name} in {self._pool.name} is replaced faster than it can be read")

    def _get(self, name: str, namespace: str | None) -> Publication | None:
        whose = None if namespace is None else namespace_id(namespace)
        for number in range(_TRIES):
            head = self._pool.heads([name], _HEAD_BYTES).get(name)
            if head is None:
                return None
            try:
                needed = self._envelope.needed(head)
                if needed > len(head):
                    head = bytes(head) + bytes(self._pool.read(name, len(head), needed) or b"")
                return _opened(name, self._envelope.open_head(_key(name), head, whose))
            except RecordError as error:
                if number + 1 == _TRIES:  # else it was replaced between two reads, perhaps
                    raise RecordError(f"the catalogue {name} in {self._pool.name} is damaged: {error}") from error
        raise AssertionError("unreachable")

    def _read(self, found: Publication, names: Iterable[bytes]) -> dict[bytes, bytes]:
        """Parts of a publication, by name."""
        wanted = [(name, found.parts[name]) for name in dict.fromkeys(names)]
        wanted.sort(key=lambda item: item[1].number)
        places = [found.head.place(part.number, part.span) for _, part in wanted]
        together = list(_together(places))
        ranges = [(places[group.start][0], places[group.stop - 1][1]) for group in together]
        with self._pool.together():
            asked = [self._pool.begin(found.name, start, stop) for start, stop in ranges if start < stop]
        come = iter(self._pool.answers(asked))
        answers = [next(come) if start < stop else b"" for start, stop in ranges]
        read = dict[bytes, bytes]()
        for group, (begin, _), answer in zip(together, ranges, answers, strict=True):
            for (name, part), (start, stop) in zip(
                wanted[group.start : group.stop], places[group.start :], strict=False
            ):
                data = memoryview(answer or b"")[start - begin : stop - begin]
                try:
                    read[name] = bytes(found.head.plain(part.number, data))
                    if _checksum(name, read[name]).to_bytes(8, "little") != part.checksum:
                        raise RecordError("a checksum differs")
                except RecordError as error:
                    now = self._pool.read(found.name, 0, ID.stop)
                    if now is None or bytes(now)[ID] != found.head.id:
                        raise _ReplacedError from error
                    raise RecordError(f"the catalogue {found.name} in {self._pool.name} is damaged: {error}") from error
        return read


def _together(places: list[tuple[int, int]]) -> Iterator[range]:
    """Which of some places, in order, are read at once: neighbours."""
    begin = 0
    for at in range(1, len(places) + 1):
        if at == len(places) or (
            places[at][0] - places[at - 1][1] > _GAP_BYTES or places[at][1] - places[begin][0] > _RANGE_BYTES
        ):
            yield range(begin, at)
            begin = at


def _opened(name: str, head: Head) -> Publication:
    data = head.header
    try:
        (length,) = _LENGTH.unpack_from(data)
        facts = json.loads(data[_LENGTH.size : _LENGTH.size + length])
        table, parts, start = data[_LENGTH.size + length :], dict[bytes, Part](), 0
        for number, (part, size, checksum) in enumerate(_PART.iter_unpack(table)):
            parts[part] = Part(number, (start, start + size), checksum.to_bytes(8, "little"))
            start += size
        if not isinstance(facts, dict) or KEYS not in parts:
            raise ValueError("it says nothing of itself")
    except (struct.error, ValueError, RecursionError) as error:
        raise RecordError(f"its header cannot be: {error}") from error
    return Publication(name, facts, parts, head)


def _checksum(name: bytes, data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(name + data)


def _folder(namespace: str) -> str:
    return f"{_FOLDER}{digest('ragkv catalogues 1', namespace).hex()}/"


def _name(namespace: str, setting: str) -> str:
    return _folder(namespace) + digest("ragkv catalogue 1", namespace, setting).hex()


def _key(name: str) -> bytes:
    """What an object is bound to."""
    return bytes.fromhex(name.rpartition("/")[2])


def _is_ours(name: str) -> bool:
    parts = name.removeprefix(_FOLDER).split("/")
    try:
        return name.startswith(_FOLDER) and [len(bytes.fromhex(part)) for part in parts] == [32, 32]
    except ValueError:
        return False
