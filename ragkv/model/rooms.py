"""Memory for keys and values that stays where it is, so that fixed steps find it: prompts' caches are its guests, one at a time.

A guest's slots are moved in, and moved out into memory of the cache's own again: nobody ever holds memory that the next prompt is
written to. C slots of a room, N tokens held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import RLock
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ragkv.forks import anew_in_forks
from ragkv.kernels import Impl, Run, place_layers
from ragkv.model.cache import FusedCache, LayerSpec, in_blocks

_SMALLEST = 256  # slots
_MOST = 2  # rooms: answers of so many threads go on without moving


def room_bucket(slots: int) -> int:
    """A room's size for so many slots: a power of two, or one of the three steps to it from the one below."""
    step = max(1, (1 << (slots - 1).bit_length()) // 8)
    return max(_SMALLEST, -(-slots // step) * step)


class Room:
    """Slots of all layers. The last one is spare: what nobody shall see is written there.

    Args:
        specs: what the layers' keys and values look like.
        slots: C.
        impl: what moves them in and out.

    Attributes:
        cache: writes into the room. It holds nothing; fixed steps are its only users.
        slots: C.
        used: slots that may hold something.
    """

    def __init__(self, specs: Sequence[LayerSpec], slots: int, impl: Impl = "auto"):
        self.slots: int = slots
        self.used: int = slots
        self._specs, self._impl = specs, impl
        self._blocks, self._rooms = in_blocks(specs, slots)
        self.cache: FusedCache = FusedCache(specs, slots, self._rooms)
        self._guest: ReferenceType[FusedCache] | None = None
        self._own: int = 0  # slots that the guest had
        self._clear(0)

    @property
    def spare(self) -> int:
        """The slot that nobody sees."""
        return self.slots - 1

    @property
    def guest(self) -> FusedCache | None:
        """Whose keys and values are here."""
        return None if self._guest is None else self._guest()

    def hosts(self, cache: FusedCache) -> bool:
        """Whether a cache's keys and values are here, all of them: it may have grown out of the room meanwhile."""
        return self.guest is cache and self._shared(cache) == 2 * len(cache.layers)

    def enter(self, cache: FusedCache, slots: int) -> None:
        """Move in a cache's first ``slots`` slots. Those behind are zero: attention reads blocks, and weighs what it hides by 0."""
        place_layers(self.cache.laid, [Run(cache.laid, 0, slots)], impl=self._impl)
        self.host(cache, slots, cache.layers[0].key_room.shape[2])

    def claim(self, cache: FusedCache) -> None:
        """Be a cache's before anything is moved."""
        self._guest = ref(cache)

    def born(self, specs: Sequence[LayerSpec]) -> FusedCache:
        """A cache whose room this is from the beginning."""
        cache = FusedCache(specs, self.slots, self._rooms)
        self.claim(cache)
        return cache

    def host(self, cache: FusedCache, slots: int, own: int) -> None:
        """Be a cache's, whose first ``slots`` slots are written, or will be before anybody reads them.

        Args:
            cache: the guest.
            slots: as above.
            own: slots that it shall have at least when it leaves.
        """
        self.claim(cache)
        self._own = own
        cache.share(self.cache)
        self._clear(slots)

    def leave(self, cache: FusedCache, settle: Callable[[], object] = lambda: None) -> None:
        """Give the guest what may be in its slots in memory of its own, as much as it had at least.

        In the middle of a pass it says that it holds nothing. Where there is no memory it stays, as long as it lives.

        Args:
            cache: the guest.
            settle: called before somebody else may enter.
        """
        longest = max(layer.length for layer in cache.layers)
        slots = max(longest, self.used)
        if self._shared(cache):
            try:
                blocks, rooms = in_blocks(self._specs, max(self._own, slots))
            except torch.OutOfMemoryError:
                return
            _copy(blocks, self._blocks, min(slots, self.slots))
            cache.leave(self.cache, rooms)
        self.used = max(self.used, longest)  # of passes that ran as they are
        settle()
        self._guest = None

    def _shared(self, cache: FusedCache) -> int:
        """How many of a cache's keys and values are here."""
        pairs = zip(cache.layers, self.cache.layers, strict=True)
        return sum((one.key_room is own.key_room) + (one.value_room is own.value_room) for one, own in pairs)

    def _clear(self, begin: int) -> None:
        for block in self._blocks:
            block[:, :, :, self.spare :].zero_()
            if begin < self.used:
                block[:, :, :, begin : self.used].zero_()
        self.used = begin


def _copy(blocks: Sequence[Tensor], here: Sequence[Tensor], slots: int) -> None:
    for block, other in zip(blocks, here, strict=True):
        block[:, :, :, :slots] = other[:, :, :, :slots]


class Rooms:
    """The rooms of one model: a few, as large as they had to be. One thread at a time enters; in any caches are born, and leave.

    Args:
        drop: told of a room that is given up, before another takes its memory.
        affords: says whether a room may take so many bytes.
        impl: what moves caches in and out.
    """

    def __init__(
        self, drop: Callable[[Room], object], affords: Callable[[int], bool] = lambda size: True, impl: Impl = "auto"
    ):
        self._drop, self._affords, self._impl = drop, affords, impl
        self.anew()
        anew_in_forks(self)

    def anew(self) -> None:
        """In a fork: answers of threads that are not there would be in their rooms for ever."""
        # The one used last comes last; replaced as a whole, since others look meanwhile.
        self._rooms: tuple[Room, ...] = ()
        self._lock: RLock = RLock()  # whose a free room is

    def born(self, slots: int, capacity: int, specs: Sequence[LayerSpec]) -> FusedCache | None:
        """A new cache that is in a room from the beginning; ``None`` where none is free that it fits into.

        Args:
            slots: that will be written before anybody reads them.
            capacity: slots that it needs, the spare one not counted.
            specs: of its layers.
        """
        with self._lock:
            room = self._free(capacity)
            if room is None:
                return None
            cache = room.born(specs)
        room.host(cache, slots, capacity)
        return cache

    def find(self, cache: FusedCache) -> Room | None:
        """The room where a cache is."""
        return next((room for room in self._rooms if room.guest is cache), None)

    def enter(self, cache: FusedCache, slots: int, room_for: int, specs: Sequence[LayerSpec]) -> Room | None:
        """Move a cache in where there is room.

        Args:
            cache: of batch size 1.
            slots: of it, to be moved.
            room_for: slots that it needs, the spare one not counted.
            specs: of its layers.

        Returns:
            The room; ``None`` where others are in all of them, or there is no memory for one.
        """
        with self._lock:
            room = self._free(room_for)
            if room is None:
                room = self._new(room_for, specs)
            if room is None:
                return None
            room.claim(cache)
            self._rooms = (*(other for other in self._rooms if other is not room), room)
        room.enter(cache, slots)
        return room

    def _free(self, room_for: int) -> Room | None:
        """The smallest that nobody is in and so many slots fit into, besides the spare one."""
        fitting = [room for room in self._rooms if room.guest is None and room.slots > room_for]
        return min(fitting, key=lambda room: room.slots, default=None)

    def _new(self, room_for: int, specs: Sequence[LayerSpec]) -> Room | None:
        """Another one, for which one that is free goes where there are too many."""
        free = [room for room in self._rooms if room.guest is None]
        size, full = room_bucket(room_for + 1), len(self._rooms) >= _MOST
        if (full and not free) or not self._affords(size * sum(spec.token_bytes for spec in specs)):
            return None
        if full:
            gone = free.pop(0)
            self._rooms = tuple(other for other in self._rooms if other is not gone)
            self._drop(gone)
            del gone
        return Room(specs, size, self._impl)

    def leave(self, cache: FusedCache, settle: Callable[[], object] = lambda: None) -> None:
        """Move a cache out of whatever room it is in; ``settle`` as for :meth:`Room.leave`."""
        for room in self._rooms:
            if room.guest is cache:
                room.leave(cache, settle)

    def forget(self) -> None:
        """Let all rooms go; whoever is in one keeps it."""
        self._rooms = ()
